"""Preconditioned diffusion sampling (PDS): masks, linear operators, predictor-corrector chains."""
