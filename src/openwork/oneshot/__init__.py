"""One-shot pruning of pretrained networks: magnitude, Wanda and SparseGPT, block by block, in memory or from files."""
