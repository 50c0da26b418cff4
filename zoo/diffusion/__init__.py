"""Sparse models of the diffusion domain."""
