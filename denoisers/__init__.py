"""Pre-trained models behind one protocol: ``D(x; sigma)`` and the bottleneck's channel mean."""
