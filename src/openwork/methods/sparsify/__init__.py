"""Methods that make a network sparse.

A method here is a Sparsifier, or a Procedure of several training legs. Its module holds `CARD` and the public class that
the card's `entry` names; the class takes `density` and, where it trains, `total_steps` as keywords.
"""
