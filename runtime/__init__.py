"""Everything around the mathematics: noise by seed, processes, records, images, logs, errors."""
