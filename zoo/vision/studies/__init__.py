"""Studies of the papers on vision: pruning, super-resolution, pre-training, point clouds."""
