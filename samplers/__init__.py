"""From options or a predictor to a sampler, and from seeds to images on disk."""
