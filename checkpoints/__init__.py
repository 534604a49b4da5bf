"""Files of others and training states, read as data: pickles, safetensors, arrays of NumPy."""
