"""Kinds of prediction, one module each: its head, loss, counts, scores and display."""
