"""Studies of the papers on graphs."""
