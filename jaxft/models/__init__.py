"""Networks: architectures, layers, heads, BatchNorm folding, and the choice of the parameters that train."""
