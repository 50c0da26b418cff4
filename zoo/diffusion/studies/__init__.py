"""Studies on diffusion models, one paper a file."""
