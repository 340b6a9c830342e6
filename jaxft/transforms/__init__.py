"""Turns uint8 images into network inputs: pure functions that run on the device."""
