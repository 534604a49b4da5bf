"""Images and captions on disk: reading, decoding and drawing them."""
