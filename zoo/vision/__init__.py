"""Sparse models of the vision domain."""
