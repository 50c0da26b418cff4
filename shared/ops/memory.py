"""Where large packed weights lie: on huge pages, where the system grants them.

A product of batch 1 walks through more memory than the processor's page tables cover; with pages of 2 MiB it
does not stop at every 4 KiB to look up the next. It gains 5 to 15 % (benchmarks/sparse_linear.py, batch 1).
The last page of a tensor is seldom full; a tensor of less than three quarters of a page stays where it is.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

PAGE = 2 << 20


def on_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor on huge pages; the tensor itself where it is small or the system has none."""
    size = tensor.numel() * tensor.element_size()
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if advice is None or size < PAGE * 3 // 4 or tensor.device.type != "cpu" or type(tensor) is not Tensor:
        return tensor
    # A page more than needed, as the memory that is granted seldom begins where a huge page can.
    memory = mmap.mmap(-1, (size // PAGE + 2) * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:  # a kernel without huge pages
        return tensor
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copy.view(tensor.shape).copy_(tensor)
