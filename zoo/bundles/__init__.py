"""Bundles: cards, weights, where they are found, and how they are published."""
