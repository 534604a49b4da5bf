"""Restart: intervals, plans, published configurations and candidate plans of a budget."""
