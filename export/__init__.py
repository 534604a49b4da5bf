"""Samplers as files for other programs: a scheduler of diffusers, a ComfyUI node, noise levels."""
