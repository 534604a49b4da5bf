"""Time grids, step rules and the one driver that walks them."""
