"""The studies: each tests one paper's claim against the right baselines; the tree mirrors `openwork.methods`."""
