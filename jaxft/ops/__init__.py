"""Formulations of convolution, normalisation and pooling for each platform."""
