"""Infrastructure: noise by seed, processes, records, images, logs, errors."""

__version__ = "0.1.0"
