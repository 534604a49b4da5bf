"""The report of a comparison: tables, plots and one HTML file."""
