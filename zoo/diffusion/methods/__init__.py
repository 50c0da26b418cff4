"""Papers on pruning diffusion models, one a file."""
