"""What is cut together, and how: groups of channels, surgery, folding, averaging."""
