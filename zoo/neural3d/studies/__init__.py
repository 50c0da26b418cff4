"""Studies of the neural3d domain, one paper a file."""
