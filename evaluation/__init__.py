"""Passes of images and samples through detectors and scorers."""
