"""From options to samplers, one file for each kind."""
