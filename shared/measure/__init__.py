"""What is measured on a model: operations and bytes, gradients and Hessians, statistics of activations."""
