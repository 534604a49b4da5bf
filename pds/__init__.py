"""Preconditioned diffusion sampling: masks from data, linear operators, predictor-corrector."""
