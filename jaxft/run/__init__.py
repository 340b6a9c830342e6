"""What a run keeps and obeys: its workdir, checkpoints, metrics, signals and processes."""
