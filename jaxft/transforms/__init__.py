"""Preprocessing and random augmentation of uint8 images: pure functions that run on the device."""
