"""Shows a run: the report, charts, the augmentation sheet and the web page."""
