"""Methods of the neural3d domain, one a file."""
