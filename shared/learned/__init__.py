"""Masks that are learned: gates in the forward pass, and constraints on the weights."""
