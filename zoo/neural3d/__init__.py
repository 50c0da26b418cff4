"""Sparse models of the neural3d domain."""
