"""k-th values per chunk, averaged, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zoo.shared.errors import BudgetError
from zoo.shared.measure.activations import ActivationThreshold, ChunkedKth, check_share


@pytest.mark.parametrize(("exact", "rtol"), [(1 << 22, 0.0), (100, 2**-13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_of_the_kth_values_of_chunks(exact, rtol, dtype):
    torch.manual_seed(0)
    pieces = [(torch.randn(20, 7) * scale).to(dtype) for scale in (1.0, 2.0, 3.0, 0.1, 5.0)]
    shares = (0.3, 0.5, 0.9)
    kth = ChunkedKth(shares, pieces=2, exact=exact)
    for piece in pieces:
        kth.update(piece)
    chunks = [torch.cat(pieces[i : i + 2]).float().abs().flatten().sort().values.numpy() for i in (0, 2, 4)]
    expected = [np.mean([chunk[int(len(chunk) * s) - 1] for chunk in chunks]) for s in shares]
    np.testing.assert_allclose(kth.values(), expected, rtol=max(rtol, 1e-7))
    assert kth.values() == kth.values(), "reading closes the last chunk once"


def test_refusals():
    for share in (0.0, 1.0, -0.1, 1.5, float("nan")):
        with pytest.raises(BudgetError, match="strictly between 0 and 1"):
            check_share(share)
    with pytest.raises(BudgetError, match="attention"):
        check_share(2.0, "attention")
    with pytest.raises(BudgetError, match="at least 1 piece"):
        ChunkedKth((0.5,), pieces=0)
    with pytest.raises(BudgetError, match="no rows"):
        ChunkedKth((0.5,)).values()
    short = ChunkedKth((0.01,))
    with pytest.raises(BudgetError, match="more or longer windows"):
        short.update(torch.randn(2, 3))


def test_a_threshold_may_stay_out_of_the_state_dict():
    assert not ActivationThreshold(1.0, persistent=False).state_dict()
    assert "threshold" in ActivationThreshold(1.0).state_dict()
