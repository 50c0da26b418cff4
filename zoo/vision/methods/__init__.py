"""Methods of image models, a paper a file."""
