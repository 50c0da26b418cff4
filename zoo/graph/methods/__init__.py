"""Methods on graphs, ratings, click models and dynamics, a paper a file."""
