"""Methods on networks that are not the zoo's own, with an own data loader: timm's ResNet and ViT."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import zoo
from zoo.methods.conformance import check_method, images_job
from zoo.methods.table import QUICK, timm_resnet, timm_vit
from zoo.registry import METHODS
from zoo.shared.errors import MaskError
from zoo.shared.structure.relatives import copied, reinitialised

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed (the extra `vision`)"
)

TRAINING = ["magnitude", "random-pruning", "dynamic-sparse", "lottery-ticket", "lottery-jackpot", "bip"]
TRAINING += ["sparse-soup", "sr-ste", "pgf", "bdwp", "iss-p"]


@pytest.mark.parametrize(("make", "size"), [(timm_resnet, 32), (timm_vit, 16)], ids=["resnet", "vit"])
@pytest.mark.parametrize("name", TRAINING)
def test_methods_train_timm_networks(name, make, size):
    job = images_job(METHODS.get(name), size)
    outcome = check_method(
        name, model=make, job=lambda: images_job(METHODS.get(name), size), **QUICK.get(name, {})
    )
    assert outcome.taken, outcome.refusal
    assert torch.isfinite(outcome.made.model(next(iter(job.sample(1)))[0])).all()


@pytest.mark.traced
def test_channels_of_timm_are_cut_or_refused_by_name():
    cut = check_method("wgsef", model=timm_resnet, job=lambda: images_job(object, 32), sparse_epochs=1)
    assert cut.taken or "ResNet" in cut.refusal
    kept = check_method("mask-sparsity", model=timm_vit, job=lambda: images_job(object, 16), sparse_epochs=1)
    assert not kept.taken and ("VisionTransformer" in kept.refusal or "blocks" in kept.refusal)


def test_sparse_ift_needs_a_wider_relative():
    outcome = check_method("sparse-ift", model=timm_vit, job=lambda: images_job(object, 16))
    assert "VisionTransformer has no method wider" in outcome.refusal


def test_fresh_weights_are_drawn_for_any_module_or_it_is_refused_by_name():
    for make in (timm_resnet, timm_vit):
        model = make()
        first, again, other = reinitialised(model, 1), reinitialised(model, 1), reinitialised(model, 2)
        for name, value in first.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]) and torch.isfinite(value).all()
        weights = [n for n, p in model.named_parameters() if p.dim() > 1]
        assert all(not torch.equal(first.get_parameter(n), other.get_parameter(n)) for n in weights)

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(4))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.layer = Positions(), nn.Linear(4, 4)

    with pytest.raises(MaskError, match=r"Net cannot .* Positions has no reset_parameters\(\) for 'inner"):
        reinitialised(Net(), 0)
    assert copied(Net().double()).layer.weight.dtype == torch.float32


def test_a_method_is_called_with_its_job_or_says_what_it_lacks(net, job):
    with pytest.raises(zoo.errors.ConfigError, match="bip learns from data: pass job"):
        zoo.sparsify(net, method="bip", sparsity=0.5)
    with pytest.raises(zoo.errors.ConfigError, match="no option 'lr' .the job's recipe"):
        zoo.sparsify(net, method="bip", job=job, lr=0.1)
    with pytest.raises(zoo.errors.ConfigError, match="a job is for a method"):
        zoo.sparsify(net, sparsity=0.5, job=job)
    assert zoo.sparsify(net, method="magnitude", sparsity=0.5).masks.sparsity() == pytest.approx(
        0.5, abs=1e-3
    )
    assert zoo.sparsify(net, sparsity=0.5).sparsity() == pytest.approx(0.5, abs=1e-3)
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    with pytest.raises(MaskError, match="'0.weight' holds NaN"):
        zoo.sparsify(net, method="bip", job=job)
