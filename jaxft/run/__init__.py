"""A run's files and its control: workdir and remote mirror, checkpoints, metrics, trackers, signals, processes."""
