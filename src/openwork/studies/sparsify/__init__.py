"""Studies of methods that make a network sparse."""
