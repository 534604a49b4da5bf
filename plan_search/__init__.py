"""The search for the best Restart plan of a budget."""
