"""The synthetic experiment of the Restart paper on the errors of samplers."""
