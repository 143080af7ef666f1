"""Layers and layer operations that two or more methods need."""
