"""Convolution, normalisation and pooling in the formulation that is fastest on each platform; see README.md."""
