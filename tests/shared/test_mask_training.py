"""Zeros survive training: every optimiser, clipping, accumulation, averaging, autocast, copies, compilation,
reloads."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from zoo.shared.errors import MaskError, OptimizerStateError
from zoo.shared.masks import Mask, MaskSet, masks_of, register_optimizer_state
from zoo.shared.masks.hold import OTHER_STATE, PER_WEIGHT_STATE
from zoo.shared.masks.patterns import NM

NAMES = ("0.weight", "3.weight")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


def some_masks(model: nn.Module, seed: int = 0) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    return MaskSet({n: Mask(torch.rand(parameters[n].shape, generator=generator) < 0.4) for n in NAMES})


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    inputs = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (model(inputs) - 1).square().mean()


def train(model: nn.Module, optimizer: Optimizer, steps: int = 4, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def assert_state_is_masked(model: nn.Module, masks: MaskSet, optimizer: Optimizer) -> int:
    """Checks every per-weight state tensor; returns how many there were."""
    parameters, seen = dict(model.named_parameters()), 0
    for name, mask in masks.items():
        for key, value in optimizer.state[parameters[name]].items():
            if key in PER_WEIGHT_STATE:
                assert (value[~mask.keep] == 0).all(), (name, key)
                seen += 1
    return seen


OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], int]] = {
    # a factory and the number of per-weight state tensors per parameter
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), 0),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), 1),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), 1),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1), 2),
    "amsgrad": (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), 3),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5), 2),
    "adamw-foreach": (lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True), 2),
    "adamw-fused": (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), 2),
    "nadam": (lambda p: torch.optim.NAdam(p, lr=0.1), 2),
    "radam": (lambda p: torch.optim.RAdam(p, lr=0.1), 2),
    "adamax": (lambda p: torch.optim.Adamax(p, lr=0.1), 2),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1), 3),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1), 1),
    "adadelta": (lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1), 2),
    "asgd": (lambda p: torch.optim.ASGD(p, lr=0.1), 1),
    "rprop": (lambda p: torch.optim.Rprop(p, lr=0.01), 1),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=0.1), 0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_survive_every_optimizer(name):
    make, tensors = OPTIMIZERS[name]
    model = net()
    masks = some_masks(model)
    optimizer = make(model.parameters())
    train(model, optimizer, steps=2)  # moments that are dense when the masks arrive
    with masks.attach(model, optimizer):
        assert_state_is_masked(model, masks, optimizer)
        for step in range(4):
            train(model, optimizer, steps=1, start=step)
            assert masks.lost_zeros(model) == []
        assert assert_state_is_masked(model, masks, optimizer) == tensors * len(masks)
        kept = {n: dict(model.named_parameters())[n][masks[n].keep] for n in NAMES}
        assert all(value.isfinite().all() and (value != 0).all() for value in kept.values())


def test_the_list_of_known_state_covers_torch():
    for make, _ in OPTIMIZERS.values():
        model = net()
        train(model, optimizer := make(model.parameters()), steps=1)
        keys = {key for state in optimizer.state.values() for key in state}
        assert keys <= PER_WEIGHT_STATE | OTHER_STATE


@pytest.mark.parametrize("clip", [torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_])
def test_clipping_sees_masked_gradients(clip):
    model, plain = net(), net()
    masks = some_masks(model)
    masks.apply_(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with masks.attach(model, optimizer):
        loss_of(model).backward()
        loss_of(plain).backward()
        masked = {
            n: p.grad * masks[n].keep if n in masks else p.grad
            for n, p in plain.named_parameters()
            if p.grad is not None
        }
        norm = torch.stack([gradient.square().sum() for gradient in masked.values()]).sum().sqrt()
        got = clip(model.parameters(), 0.01)
        if got is not None:
            assert float(got) == pytest.approx(float(norm), rel=1e-5)
        optimizer.step()
        assert masks.lost_zeros(model) == []


def test_accumulated_gradients_are_masked_sums():
    model, plain = net(), net()
    masks = some_masks(model)
    masks.apply_(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with masks.attach(model, optimizer):
        for micro in range(3):
            loss_of(model, micro).backward()
            loss_of(plain, micro).backward()
        for name in NAMES:
            got = dict(model.named_parameters())[name].grad
            expected = dict(plain.named_parameters())[name].grad * masks[name].keep
            assert torch.allclose(got, expected, atol=1e-6)
        optimizer.step()
        assert masks.lost_zeros(model) == []


@pytest.mark.parametrize("ema", [False, True])
def test_weight_averages_keep_the_zeros(ema):
    model = net()
    masks = some_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with masks.attach(model, optimizer):
        decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9) if ema else None
        averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)
        for step in range(4):
            train(model, optimizer, steps=1, start=step)
            averaged.update_parameters(model)
    assert masks.lost_zeros(averaged) == []
    found = masks_of(averaged)
    assert found is not None and found.equal(masks)
    assert not torch.equal(averaged.module[3].weight, model[3].weight)


def test_autocast():
    model = net()
    masks = some_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with masks.attach(model, optimizer):
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, step)
            loss.backward()
            assert all((p.grad[~masks[n].keep] == 0).all() for n, p in model.named_parameters() if n in masks)
            optimizer.step()
    assert masks.lost_zeros(model) == [] and model[0].weight.dtype == torch.float32


def test_a_model_in_bfloat16():
    model = net().bfloat16()
    masks = some_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with masks.attach(model, optimizer):
        inputs = torch.randn(4, 3, 6, 6, dtype=torch.bfloat16)
        model(inputs).square().mean().backward()
        optimizer.step()
    assert masks.lost_zeros(model) == []


def test_infinite_gradients_at_dropped_weights_do_no_harm():
    model = nn.Linear(2, 1, bias=False)
    masks = MaskSet({"weight": torch.tensor([[True, False]])})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with masks.attach(model, optimizer):
        model(torch.tensor([[1.0, torch.inf]]).nan_to_num(posinf=3e38)).square().sum().backward()
        model.weight.grad[0, 1] = torch.nan  # set by hand, past the gradient hook
        optimizer.step()
    assert model.weight[0, 1] == 0


def test_without_the_optimizer_the_handle_steps():
    model = net()
    masks = some_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    train(model, optimizer, steps=2)
    with masks.attach(model) as handle:
        train(model, optimizer, steps=1)
        assert masks.lost_zeros(model), "Adam's old moments move dropped weights"
        handle.step()
        assert masks.lost_zeros(model) == []


def test_two_optimizers():
    model = net()
    masks = some_masks(model)
    pair = [
        torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW(model[3].parameters()),
    ]
    with masks.attach(model, pair):
        for step in range(3):
            loss_of(model, step).backward()
            for optimizer in pair:
                optimizer.step()
            assert masks.lost_zeros(model) == []


def test_loaded_optimizer_state_is_masked():
    model, donor = net(), net()
    train(donor, dense := torch.optim.Adam(donor.parameters(), lr=0.1))
    masks = some_masks(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with masks.attach(model, optimizer):
        optimizer.load_state_dict(dense.state_dict())
        assert assert_state_is_masked(model, masks, optimizer) == 4
        train(model, optimizer, steps=1)
        assert masks.lost_zeros(model) == []


def test_loaded_dense_weights_are_masked_and_keys_never_change():
    model = net()
    keys = list(model.state_dict())
    masks = some_masks(model)
    with masks.attach(model):
        assert list(model.state_dict()) == keys
        model.load_state_dict(net(seed=1).state_dict(), strict=True)
        assert masks.lost_zeros(model) == []
        saved = copy.deepcopy(model.state_dict())
    fresh = net(seed=2)
    fresh.load_state_dict(saved, strict=True)
    assert masks.lost_zeros(fresh) == [] and list(fresh.state_dict()) == keys


def test_detaching_leaves_a_clean_model():
    model = net()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with some_masks(model).attach(model, optimizer):
        train(model, optimizer, steps=1)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert not model._load_state_dict_post_hooks and not model._forward_hooks and not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    loss_of(model).backward()
    optimizer.step()
    assert some_masks(model).lost_zeros(model), "a detached model trains densely"
    some_masks(model).attach(model, optimizer).detach()  # and can be masked again


def test_an_exception_inside_the_context_detaches():
    model = net()
    with pytest.raises(RuntimeError, match="out of luck"), some_masks(model).attach(model):
        raise RuntimeError("out of luck")
    assert not model[0].weight._backward_hooks


def test_copies_of_an_attached_model_are_free_and_carry_the_masks():
    model = net()
    masks = some_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with masks.attach(model, optimizer):
        train(model, optimizer, steps=1)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            found = masks_of(twin)
            assert found is not None and found.equal(masks) and found.lost_zeros(twin) == []
            assert not any(parameter._backward_hooks for parameter in twin.parameters())
            own = torch.optim.AdamW(twin.parameters(), lr=0.1)
            with found.attach(twin, own):
                train(twin, own)
                assert found.lost_zeros(twin) == []
            assert not twin._load_state_dict_post_hooks
        copy.deepcopy(optimizer)
        train(model, optimizer, steps=1)
        assert masks.lost_zeros(model) == []


def _work(model: nn.Module, queue) -> None:
    masks = masks_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with masks.attach(model, optimizer):
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
    queue.put((masks.lost_zeros(model), masks.sparsity()))


def test_an_attached_model_goes_to_a_worker_process():
    model = nn.Linear(4, 4)
    masks = MaskSet({"weight": Mask(NM(2, 4).keep(torch.rand(4, 4), 8), NM(2, 4))})
    with masks.attach(model), warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of hooks that are lost, unless they say so themselves
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
        context = torch.multiprocessing.get_context("fork")
        assert isinstance(context, multiprocessing.context.BaseContext)
        queue = context.Queue()
        # Through the pickler that spawn and DataLoader workers use.
        worker = context.Process(target=_work, args=(pickle.loads(_forking_pickle(model)), queue))
        worker.start()
        assert queue.get(timeout=300) == ([], 0.5)
        worker.join()


def _forking_pickle(model: nn.Module) -> bytes:
    from multiprocessing.reduction import ForkingPickler

    return bytes(ForkingPickler.dumps(model))


@pytest.mark.parametrize("when", ["attach first", "compile first"])
def test_torch_compile(when):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    masks = MaskSet({"0.weight": torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) < 0.5})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    # aot_eager traces forward and backward as inductor does, without a C++ compiler.
    compiled = torch.compile(model, backend="aot_eager")
    if when == "compile first":
        compiled(torch.randn(3, 4)).sum().backward()
    with masks.attach(compiled, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            compiled(torch.randn(3, 4)).square().mean().backward()
            assert (model[0].weight.grad[~masks["0.weight"].keep] == 0).all()
            optimizer.step()
            assert masks.lost_zeros(model) == []
        assert masks.lost_zeros(compiled) == [] and masks_of(compiled) is masks_of(model)
    inputs = torch.randn(3, 4)
    assert torch.allclose(compiled(inputs), model(inputs), atol=1e-6)


class Strange(torch.optim.SGD):
    """Keeps something of its own per weight."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["secret"] = torch.ones_like(parameter)


def test_unknown_optimizer_state_is_refused_not_guessed(monkeypatch):
    model = net()
    optimizer = Strange(model.parameters(), lr=0.1)
    message = r"Strange holds state 'secret' for '0.weight'.*register_optimizer_state\('secret'\)"
    with some_masks(model).attach(model, optimizer), pytest.raises(OptimizerStateError, match=message):
        train(model, optimizer, steps=1)
    with pytest.raises(OptimizerStateError, match=message):
        some_masks(model).attach(model, optimizer)
    assert not model[0].weight._backward_hooks, "a refused attach leaves nothing behind"
    monkeypatch.setattr("zoo.shared.masks.hold.PER_WEIGHT_STATE", set(PER_WEIGHT_STATE))
    register_optimizer_state("secret")
    with some_masks(model).attach(model, optimizer):
        train(model, optimizer, steps=1)
        assert (optimizer.state[model[0].weight]["secret"][~some_masks(model)["0.weight"].keep] == 0).all()


def test_lbfgs_is_refused():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters())
    with some_masks(model).attach(model, optimizer), pytest.raises(OptimizerStateError, match="LBFGS"):
        optimizer.step(lambda: loss_of(model))


def test_sparse_gradients_are_refused():
    model = nn.Embedding(4, 2, sparse=True)
    masks = MaskSet({"weight": torch.rand(4, 2) < 0.5})
    with masks.attach(model), pytest.raises(MaskError, match="sparse=False"):
        model(torch.tensor([0, 1])).sum().backward()


def test_attaching_twice_is_refused():
    model = net()
    with some_masks(model).attach(model), pytest.raises(MaskError, match="already attached to '0.weight'"):
        some_masks(model).attach(model)


def test_a_replaced_parameter_is_noticed():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noticed = pytest.raises(MaskError, match="'0.weight' was replaced")
    with noticed, some_masks(model).attach(model, optimizer) as handle:
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        for step in (handle.step, optimizer.step):
            with pytest.raises(MaskError, match="'0.weight' was replaced"):
                step()
    assert not model._load_state_dict_post_hooks  # leaving the context said it, and detached all the same


def test_frozen_parameters_may_carry_masks():
    model = net()
    model[0].weight.requires_grad_(False)
    masks = some_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with masks.attach(model, optimizer):
        train(model, optimizer, steps=1)
        model[0].weight.requires_grad_(True)
        train(model, optimizer, steps=2)
        assert masks.lost_zeros(model) == []


def test_tied_parameters_train_masked():
    embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, head)
    keep = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    masks = MaskSet({"0.weight": keep, "1.weight": keep})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with masks.attach(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(5)).square().mean().backward()
            optimizer.step()
            assert masks.lost_zeros(model) == []
            assert model[0].weight is model[1].weight


def test_regrown_weights_start_at_zero_with_zero_moments():
    model = net()
    old = some_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with old.attach(model, optimizer) as handle:
        train(model, optimizer)
        new = some_masks(model, seed=1)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        moments = {n: optimizer.state[p]["exp_avg_sq"].clone() for n, p in model.named_parameters()}
        handle.update(new)
        assert handle.masks is new and masks_of(model) is new
        for name, parameter in model.named_parameters():
            if name not in new:
                continue
            grown, both = new[name].keep & ~old[name].keep, new[name].keep & old[name].keep
            state = optimizer.state[parameter]
            assert grown.any() and both.any()
            assert (parameter[grown] == 0).all() and (parameter[~new[name].keep] == 0).all()
            assert (state["exp_avg"][grown] == 0).all() and (state["exp_avg_sq"][grown] == 0).all()
            assert torch.equal(parameter[both], before[name][both])
            assert torch.equal(state["exp_avg_sq"][both], moments[name][both])
        train(model, optimizer)
        assert new.lost_zeros(model) == []
        for name in new:
            grown = new[name].keep & ~old[name].keep
            assert (dict(model.named_parameters())[name][grown] != 0).any(), "grown weights learn"
        with pytest.raises(MaskError, match="same tensors; differing: .'3.weight'."):
            handle.update(MaskSet({"0.weight": new["0.weight"]}))


def test_dense_gradients_are_kept_aside_only_when_asked():
    model, plain = net(), net()
    masks = some_masks(model)
    masks.apply_(plain)
    with masks.attach(model) as handle:
        loss_of(model).backward()
        assert handle.take_dense_gradients() == {}
        handle.capture_gradients(True)
        for micro in range(2):
            loss_of(model, micro).backward()
            loss_of(plain, micro).backward()
        handle.capture_gradients(False)
        loss_of(model).backward()
        taken = handle.take_dense_gradients()
        assert set(taken) == set(NAMES) and handle.take_dense_gradients() == {}
        for name in NAMES:
            assert torch.allclose(taken[name], dict(plain.named_parameters())[name].grad, atol=1e-6)
