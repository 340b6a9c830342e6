"""Shows a run to people: its report, a sheet of augmented images and the prediction page."""
