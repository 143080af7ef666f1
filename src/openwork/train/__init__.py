"""Training: one explicit loop, exact checkpoints, scores, and accuracy under attack."""
