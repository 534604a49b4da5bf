"""Image quality: detectors, streaming statistics and distances between them."""
