"""Image quality metrics: detectors, streaming statistics and distances."""
