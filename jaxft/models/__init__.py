"""Networks, and which of their parameters train."""
