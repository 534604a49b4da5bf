"""Training a denoiser: batches, augmentation, the loop and its report."""
