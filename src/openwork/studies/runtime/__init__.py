"""Studies of methods whose sparsity is made for the kernels that run it."""
