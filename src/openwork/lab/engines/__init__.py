"""Engines: where the trials of a sweep run, on this machine or over a cluster."""
