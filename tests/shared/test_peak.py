"""The peak of living tensors against sums by hand."""

from __future__ import annotations

import torch

from zoo.shared.measure.peak import peak_bytes


def test_the_peak_counts_what_lives_at_once() -> None:
    x = torch.zeros(100)  # 400 bytes, there before

    def chain() -> torch.Tensor:
        y = x.view(10, 10).T + 1  # 400: a view makes nothing
        y = y * 2  # 800, then 400
        y = y + x.view(10, 10)  # 800
        return y[0, :3]

    def kept() -> list[torch.Tensor]:
        return [x + 1 for _ in range(5)]

    assert peak_bytes(chain) == 800 == peak_bytes(chain)
    assert peak_bytes(kept) == 2000
    assert peak_bytes(lambda: x.add_(1)) == 0
