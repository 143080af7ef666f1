"""Holding masks over a model while it trains: the Sparsifier, the prune-and-grow core, and procedures of several legs."""

from openwork.sparsifier.procedure import Leg, Probe, Procedure, Train
from openwork.sparsifier.sparsifier import Fixed, Sparsifier

__all__ = ["Fixed", "Leg", "Probe", "Procedure", "Sparsifier", "Train"]
