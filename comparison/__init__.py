"""The comparison at matched budgets: which rows, how each is measured, how it is reported."""
