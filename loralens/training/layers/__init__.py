"""The layers that are trained: a pair beside a linear layer, a convolution, an embedding or experts, and its start."""
