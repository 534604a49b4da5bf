"""Learned non-stationary solvers: whole samplers as tables, fitted in closed form and refined."""
