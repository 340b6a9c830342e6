"""Labelled images: their sources (samples, folders, TFDS), the array cache, batches, and loaders for the devices."""
