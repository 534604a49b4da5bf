"""Teachers: trajectories of many evaluations, and the targets that a student learns."""
