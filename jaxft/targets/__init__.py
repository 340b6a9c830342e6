"""What a network predicts: its head, loss, counts, scores and display."""
