"""Studies of the papers on language models, one file each."""
