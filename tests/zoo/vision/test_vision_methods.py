"""Methods of no domain on the domain's networks: widths, residual channels, pointwise convolutions."""

from __future__ import annotations

import pytest
import torch

from zoo.methods.fast_convnets import FastConvNet
from zoo.methods.mask_sparsity import MaskSparsity
from zoo.methods.sparse_ift import SparseIFT, forward_macs
from zoo.methods.wgsef import WGSEF
from zoo.shared.errors import MaskError
from zoo.shared.pruning.inventory import inner_weights, pointwise_weights
from zoo.shared.structure.relatives import copied, reinitialised
from zoo.vision.mobilenet import MobileNetV1
from zoo.vision.models import ResNet


def test_sparse_ift_is_wider_at_no_more_operations(net, job):
    example = job.batches.example()
    for growth in ("rigl", "static"):
        wide = SparseIFT(0.75, growth=growth).sparsify(net, job)
        assert wide.model.arguments["widths"] == [16, 32, 32]
        assert 0.97 < forward_macs(wide.model, example) / forward_macs(net, example) <= 1.0
        assert list(wide.masks) == inner_weights(wide.model) and wide.masks.sparsity() > 0.75


@pytest.mark.traced
@pytest.mark.parametrize("shortcut", ["pad", "conv"])
@pytest.mark.parametrize("kind", [MaskSparsity, WGSEF])
def test_channels_are_really_removed_with_their_moments(kind, shortcut, job):
    model = reinitialised(ResNet(8, 8, classes=4, channels=1, shortcut=shortcut), 0)
    trained = copied(model)
    fit, keep = kind(0.5, sparse_epochs=1).cut(trained, job)
    assert sum(p.numel() for p in trained.parameters()) < sum(p.numel() for p in model.parameters())
    total, kept = (sum(f(units) for units in keep.values()) for f in (len, lambda u: int(u.sum())))
    assert kept == total - total // 2
    own = {id(p) for p in trained.parameters()}
    for group in fit.optimizer.param_groups:
        assert {id(p) for p in group["params"]} == own
    for parameter, state in fit.optimizer.state.items():
        assert state.get("momentum_buffer") is None or state["momentum_buffer"].shape == parameter.shape
    fit.run()
    again = type(trained)(**trained.current_arguments())
    again.load_state_dict(trained.state_dict())


def test_fast_convnets_prune_pointwise_weights_only(job, net):
    model = reinitialised(MobileNetV1(0.25, classes=4, channels=1, stem_stride=1), 0)
    masks = FastConvNet(0.8, pattern="block4x1").sparsify(model, job).masks
    assert list(masks) == pointwise_weights(model) and len(masks) == 13
    grouped = next(iter(masks.values())).keep.flatten(1).unflatten(0, (-1, 4))
    assert torch.equal(grouped.any(1), grouped.all(1))
    with pytest.raises(MaskError, match="no 1x1"):
        FastConvNet(0.8).sparsify(net, job)
