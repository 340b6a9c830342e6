"""Trains and evaluates: state, steps, optimizer and loop."""
