"""Sparse methods that belong to no domain, and the contract that every method keeps."""
