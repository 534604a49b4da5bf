"""Solver error without a reference: distance to the exact solution of the ODE."""
