"""Training and evaluation: state, steps, optimizer, loop, and the start of a run."""
