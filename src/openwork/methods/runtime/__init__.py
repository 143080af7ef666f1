"""Methods whose sparsity is made for the kernels that run it."""
