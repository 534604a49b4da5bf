"""Samplers built from options or a predictor, and sampling of images by seed."""
