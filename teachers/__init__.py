"""Teachers: high-NFE trajectories and the targets that supervise a student."""
