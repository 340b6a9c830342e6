"""Reads labelled images and brings them to the devices."""
