"""How tensors are stored: atomic files and the packed container."""
