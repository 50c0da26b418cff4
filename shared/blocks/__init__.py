"""Walks of networks block by block, with the inputs of each block and statistics of them."""

from .chains import block_name, find_chains
from .statistics import MeasuredMatrices, chain_matrices, measure_inputs
from .walk import Forward, Opened, RunningBlock, call, walk_blocks

__all__ = [
    "Forward",
    "MeasuredMatrices",
    "Opened",
    "RunningBlock",
    "block_name",
    "call",
    "chain_matrices",
    "find_chains",
    "measure_inputs",
    "walk_blocks",
]
