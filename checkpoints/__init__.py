"""Published checkpoints, read as data: pickles, safetensors, and what they mean."""
