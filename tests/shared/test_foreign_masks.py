"""Checkpoints of other libraries: zeros found, packed forms unpacked by hand, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from zoo.shared.errors import MaskError
from zoo.shared.masks.foreign import masks_from_zeros, plain_state
from zoo.shared.masks.patterns import NM, Unstructured


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def test_zeros_of_any_checkpoint() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[2].weight[0, 0] = 0  # one of 18: more than a twentieth
    masks = masks_from_zeros(model, at_least=0.06)
    assert list(masks) == ["0.weight"] and masks["0.weight"].pattern == NM(2, 4)
    assert torch.equal(masks["0.weight"].keep, model[0].weight != 0)
    assert masks_from_zeros(model)["2.weight"].pattern == Unstructured()
    with pytest.raises(MaskError, match="no parameter has 5% zeros"):
        masks_from_zeros(network())


def test_torchs_own_pruning_comes_in_without_its_hooks() -> None:
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_unstructured(model[2], "bias", amount=1)
    x = torch.randn(4, 8)
    expected, plain = model(x), network()
    state, masks = plain_state(model.state_dict())
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x), expected)
    assert masks["0.weight"].kept == 24 and masks["2.bias"].kept == 2
    assert masks.lost_zeros(plain) == []
    broken = dict(model.state_dict())
    del broken["0.weight_mask"]
    with pytest.raises(MaskError, match="'0.weight_orig' is there without '0.weight_mask'"):
        plain_state(broken)


def compressed(half: bool = False) -> dict[str, torch.Tensor]:
    """Two rows of ten weights, as compressed-tensors writes them: bit i of byte j is column 8 j + i."""
    state = {
        "a.shape": torch.tensor([2, 10]),
        "a.compressed": torch.tensor([1.0, 2, 3, 4]),
        "a.bitmask": torch.tensor([[0b00000101, 0b10], [0b10000000, 0]], dtype=torch.uint8),
        "a.row_offsets": torch.tensor([0, 3]),
        "a.bias": torch.zeros(2),
    }
    if half:  # 2:4, and the shape as a column
        state |= {
            "a.shape": torch.tensor([[2], [4]]),
            "a.compressed": torch.tensor([[1.0, 2], [3, 4]]),
            "a.bitmask": torch.tensor([[0b1001], [0b0110]], dtype=torch.uint8),
        }
        del state["a.row_offsets"]
    return state


def test_bitmasks_of_compressed_tensors_by_hand() -> None:
    state, masks = plain_state(compressed())
    expected = torch.zeros(2, 10)
    expected[0, 0], expected[0, 2], expected[0, 9], expected[1, 7] = 1, 2, 3, 4
    assert torch.equal(state["a.weight"], expected) and set(state) == {"a.weight", "a.bias"}
    assert torch.equal(masks["a.weight"].keep, expected != 0)
    state, masks = plain_state(compressed(half=True))
    assert state["a.weight"].tolist() == [[1, 0, 0, 2], [0, 3, 4, 0]]
    assert masks["a.weight"].pattern == NM(2, 4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.compressed", torch.ones(5), "keeps 4 values, a.compressed has 5"),
        ("a.bitmask", torch.zeros(2, 1, dtype=torch.uint8), r"a.bitmask is torch.uint8 \[2, 1\]"),
        ("a.shape", torch.tensor([2, 10, 1]), "for a weight of"),
        ("a.bitmask", None, "without 'a.bitmask'"),
        ("b.weight_packed", torch.ones(1), "is quantised"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: torch.Tensor | None, message: str) -> None:
    state = copy.copy(compressed())
    state.pop(name, None)
    if value is not None:
        state[name] = value
    with pytest.raises(MaskError, match=message):
        plain_state(state)
