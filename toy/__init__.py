"""The Restart paper's synthetic experiment: where the error of a sampler comes from."""
