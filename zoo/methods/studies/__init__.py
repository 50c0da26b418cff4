"""Studies of methods that belong to no domain."""
