"""Images and captions on disk: the one place that reads and writes them."""
