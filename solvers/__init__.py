"""Time grids, step rules, and the driver that integrates with them."""
