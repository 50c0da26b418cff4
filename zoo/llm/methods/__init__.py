"""Methods of the language domain, one paper a file."""
