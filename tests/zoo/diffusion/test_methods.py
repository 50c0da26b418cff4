"""The post-training methods on a small text-to-image model: defining steps by hand, exact counts,
refusals."""

from __future__ import annotations

import copy
import dataclasses
import time

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.diffusion.domain import make_job  # noqa: E402
from zoo.diffusion.gates import gated  # noqa: E402
from zoo.diffusion.methods.ecodiff import EcoDiff, column_norms, gates, kept_units  # noqa: E402
from zoo.diffusion.methods.laptop import Laptop, output_loss, removable_layers  # noqa: E402
from zoo.diffusion.methods.stable_diffusion import PruneParts, mixed_sparsity  # noqa: E402
from zoo.diffusion.models import TextToImage  # noqa: E402
from zoo.diffusion.parts import prompts_of, run_sampler  # noqa: E402
from zoo.diffusion.plan import Plan  # noqa: E402
from zoo.diffusion.prompting import Jobs, noisy_images  # noqa: E402
from zoo.diffusion.sampling import require_differentiable, sample  # noqa: E402
from zoo.diffusion.units import layers, unit_groups  # noqa: E402
from zoo.errors import ConfigError  # noqa: E402
from zoo.shared.errors import BudgetError, SparseError  # noqa: E402
from zoo.shared.train import Recipe  # noqa: E402


@pytest.fixture(scope="module")
def model() -> TextToImage:
    torch.manual_seed(0)
    return TextToImage(side=8, widths=(16, 16), attention=(True, True), text_width=16, text_layers=1).eval()


@pytest.fixture(scope="module")
def job(model):
    return make_job(
        "digits", recipe=Recipe(epochs=1, steps=2, batch=16, lr=1e-3, optimizer="adam"), model=model
    )


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "random"])
def test_parts_lose_exactly_their_shares(model, job, score: str, scope: str) -> None:
    net = copy.deepcopy(model)
    made = PruneParts(0.5, 0.25, score=score, scope=scope, prompts=16, sampling_steps=2).sparsify(net, job)
    text = [mask for name, mask in made.masks.items() if name.startswith("text_encoder")]
    rest = [mask for name, mask in made.masks.items() if name.startswith("unet")]
    for masks, share in ((text, 0.5), (rest, 0.25)):
        total = sum(mask.keep.numel() for mask in masks)
        zeros = sum(int((~mask.keep).sum()) for mask in masks)
        assert abs(zeros - share * total) <= (1 if scope == "global" else len(masks))
        if scope == "layer":
            assert all(abs(int((~m.keep).sum()) - share * m.keep.numel()) <= 1 for m in masks)
        if scope == "row":
            counts = [m.keep.flatten(1).sum(1) for m in masks]
            assert all(int(c.max() - c.min()) <= 1 for c in counts)
    assert not made.masks.lost_zeros(net)
    assert not any("conv_in" in name or "time_embedding" in name for name in made.masks)


def test_wanda_hears_both_halves_of_the_guidance_batch(model, job, monkeypatch) -> None:
    """With guidance the empty prompt is measured too: the norms differ from those without."""
    norms = {}
    for guidance in (1.0, 3.0):
        norms[guidance] = PruneParts(score="wanda", prompts=8, sampling_steps=2, guidance=guidance)._norms(
            model, job
        )
    name = next(n for n in norms[1.0] if n.startswith("text_encoder"))
    assert bool((norms[3.0][name] > norms[1.0][name]).all())


def test_the_papers_split_gives_its_total() -> None:
    """SD2: 340.4 M and 865.9 M parameters; 47.5 % and 35 % of them are 38.5 % of all."""
    assert round(100 * mixed_sparsity({"text": (340_400_000, 0.475), "unet": (865_900_000, 0.35)}), 1) == 38.5


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_impossible_shares_are_refused(model, share: float) -> None:
    with pytest.raises(BudgetError):
        PruneParts(sparsity=share).sparsify(copy.deepcopy(model))


def test_bad_models_and_missing_jobs_are_refused(model, job) -> None:
    broken = copy.deepcopy(model)
    next(broken.unet.parameters()).data[0] = float("nan")
    for method in (PruneParts(), EcoDiff(), Laptop()):
        with pytest.raises(ConfigError, match="NaN or infinity"):
            method.sparsify(copy.deepcopy(broken), job)
    for method in (PruneParts(score="wanda"), EcoDiff(), Laptop()):
        with pytest.raises(ConfigError, match="job"):
            method.sparsify(copy.deepcopy(model))
    with pytest.raises(BudgetError, match="all removable layers together have"):
        Laptop(remove=0.99).sparsify(copy.deepcopy(model), job)
    for keep in (0.0, 1.5, float("nan")):
        with pytest.raises(BudgetError, match="keep is a share"):
            EcoDiff(keep=keep).sparsify(copy.deepcopy(model), job)
    with pytest.raises(BudgetError, match="updates=1 or more; received 0"):
        EcoDiff(updates=0).sparsify(copy.deepcopy(model), job)
    with pytest.raises(ConfigError, match="9 words|words"):
        model.tokenise(["one two three four five six seven eight nine"])


@pytest.mark.parametrize("method", [PruneParts(), EcoDiff(score="norm"), Laptop(score="magnitude")])
def test_weights_that_do_not_work_by_themselves_are_refused(model, method) -> None:
    fused = copy.deepcopy(model)
    fused.unet.fuse_qkv_projections()
    with pytest.raises(ConfigError, match="unfuse_qkv_projections"):
        method.sparsify(fused)
    adapted = copy.deepcopy(model)
    attention = adapted.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.to_q = Adapted(attention.to_q)
    with pytest.raises(ConfigError, match="unload_lora_weights"):
        method.sparsify(adapted)
    quantised = copy.deepcopy(model)
    linear = quantised.unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2]
    linear.weight = torch.nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="before quantising"):
        method.sparsify(quantised)


class Adapted(torch.nn.Module):
    """A linear layer with low-rank updates, as peft attaches them."""

    def __init__(self, base_layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


def test_guidance_goes_past_what_the_prompt_says_by_hand(model) -> None:
    """Noise 3 with the prompt and 1 without it, three times as far: a step by noise 7."""

    class Constant:
        scheduler = model.scheduler

        def denoise(self, x: torch.Tensor, times: torch.Tensor, condition: float) -> torch.Tensor:
            return torch.full_like(x, condition)

    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    guided = sample(Constant(), noise, 3.0, steps=2, guidance=3.0, unconditional=1.0)
    assert torch.allclose(guided, sample(Constant(), noise, 7.0, steps=2))


def test_recomputation_gives_the_gradient_of_back_propagation(model, job) -> None:
    network = model.unet
    groups = unit_groups(network)
    noise, ids = prompts_of(job.sample(1), 4)
    condition = model.encode(ids).detach()
    target = sample(model, noise, condition, steps=3).detach()
    found = []
    for recompute in (False, True):
        variables = {g.name: torch.full((g.count,), 0.5, requires_grad=True) for g in groups}
        torch.manual_seed(5)
        method = EcoDiff(sampling_steps=3, recompute=recompute)
        method.descend(
            network, variables, lambda r: sample(model, noise, condition, steps=3, recompute=r), target
        )
        found.append(torch.cat([v.grad for v in variables.values()]))
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-9) and float(found[0].abs().max()) > 0


def saved_bytes(model, job, steps: int, recompute: bool) -> int:
    groups = unit_groups(model.unet)
    variables = {g.name: torch.full((g.count,), 0.5, requires_grad=True) for g in groups}
    noise, ids = prompts_of(job.sample(1), 4)
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        gated(model.unet, gates(variables, 0.5)),
    ):
        sample(model, noise, model.encode(ids).detach(), steps=steps, recompute=recompute)
    return total


def test_saved_activations_do_not_grow_with_the_steps(model, job) -> None:
    frozen = copy.deepcopy(model).requires_grad_(False)
    full = [saved_bytes(frozen, job, steps, False) for steps in (2, 8)]
    flat = [saved_bytes(frozen, job, steps, True) for steps in (2, 8)]
    assert full[1] > 3 * full[0]
    assert flat[1] - flat[0] < (full[1] - full[0]) / 50  # latents at the borders of steps only


def test_a_mask_variable_falls_only_where_its_unit_does_nothing(model, job) -> None:
    """By hand: beta R pulls all variables down alike; a unit whose columns are zero has no other gradient."""
    net = copy.deepcopy(model)
    group = unit_groups(net.unet)[1]
    linear = net.unet.get_submodule(group.columns[0].linear)
    linear.weight.data[:, : group.width] = 0
    variables = {g.name: torch.full((g.count,), 0.0, requires_grad=True) for g in unit_groups(net.unet)}
    noise, ids = prompts_of(job.sample(1), 4)
    condition = net.encode(ids).detach()
    torch.manual_seed(0)
    zeros = torch.zeros_like(noise)
    EcoDiff(beta=1.0).descend(net.unet, variables, lambda _: sample(net, noise, condition, steps=2), zeros)
    slope = torch.sigmoid(torch.tensor(1.0)) * (1 - torch.sigmoid(torch.tensor(1.0))) * 0.4
    expected = slope / (group.count * len(variables))
    assert float(variables[group.name].grad[0]) == pytest.approx(float(expected), rel=1e-4)


def test_ecodiff_keeps_the_shares_and_cuts_what_it_gated(model, job) -> None:
    net = copy.deepcopy(model)
    groups = unit_groups(net.unet)
    scores = {g.name: column_norms(net.unet, g) for g in groups}
    kept = dict(kept_units(groups, scores, 0.5, "global"))
    masks = {g.name: torch.tensor([float(u in kept[g.name]) for u in range(g.count)]) for g in groups}
    noise, ids = prompts_of(job.sample(1), 4)
    with torch.no_grad(), gated(net.unet, masks):
        expected = run_sampler(net, (noise, ids), 3)
    made = EcoDiff(keep=0.5, score="norm").sparsify(net)
    with torch.no_grad():
        assert (run_sampler(made.model, (noise, ids), 3) - expected).abs().max() < 1e-5
    for kind in ("heads", "neurons"):
        total = sum(g.count for g in groups if g.kind == kind)
        assert sum(len(kept[g.name]) for g in groups if g.kind == kind) == round(0.5 * total)
    again = TextToImage(**made.arguments)
    again.load_state_dict(net.state_dict())


def test_learning_is_repeatable_and_leaves_the_weights(model, job) -> None:
    net = copy.deepcopy(model)
    groups = unit_groups(net.unet)
    method = EcoDiff(updates=2, sampling_steps=2, prompts=4)
    first, second = (method.scores(net, groups, job) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), model.parameters(), strict=True))
    assert all(p.requires_grad for p in net.parameters())


def test_the_cheapest_layers_go_and_the_output_loss_is_what_it_says(model, job) -> None:
    net = copy.deepcopy(model)
    inputs = noisy_images(net, job, 16)
    removable = [layer for layer in layers(net.unet) if layer.removable]
    costs = Laptop(images=16).costs(net, removable, job)
    for layer, cost in zip(removable, costs, strict=True):
        alone = copy.deepcopy(model)
        alone.cut(Plan(dropped=(layer.name,)))
        with torch.no_grad():
            expected = (alone(*inputs) - net(*inputs)).square().mean()
        assert cost == pytest.approx(float(expected), rel=1e-4)
    assert output_loss(net.unet, [removable[0].name], Jobs(net, job).outputs(16, True)) >= costs[0] * 0.999
    before = sum(p.numel() for p in net.unet.parameters())
    made = Laptop(remove=0.2, images=16, distil=True).sparsify(net, job)
    after = sum(p.numel() for p in made.model.unet.parameters())
    assert after <= 0.8 * before
    assert made.arguments["pruning_plan"]["dropped"]


def test_a_budget_of_time_takes_the_slow_layer_where_costs_are_equal(model, job, monkeypatch) -> None:
    """Layers that cost the same: the one that sleeps frees enough alone."""
    net = copy.deepcopy(model)
    removable = removable_layers(net.unet)
    slow = removable[1]
    net.unet.get_submodule(slow.name).register_forward_hook(lambda *_: time.sleep(0.05))
    monkeypatch.setattr(Laptop, "costs", lambda self, model, removable, job: [1.0] * len(removable))
    method = Laptop(remove=0.3, budget="latency")
    freed, total = method.freed(net, removable, job)
    assert freed[1] >= 50e6 and total >= freed[1] and min(freed) > 0
    assert method.choose(removable, [1.0] * len(removable), freed, total) == [slow]
    assert not net.unet._forward_hooks and not net.unet._forward_pre_hooks
    made = method.sparsify(net, job)
    assert made.hyperparameters["dropped"] == [slow.name]
    seen: list[int] = []
    net.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    dataclasses.replace(method, timed=5).freed(net, removable, job)
    assert seen and {*seen} == {5}
    with pytest.raises(BudgetError, match="at least one image; received 0"):
        Laptop(timed=0).sparsify(net, job)
    with pytest.raises(ConfigError, match="measured on an image: give a job"):
        Laptop(score="magnitude", budget="latency").sparsify(net)
    with pytest.raises(BudgetError, match="latency cannot be removed"):
        Laptop(remove=0.99, budget="latency").sparsify(copy.deepcopy(model), job)


def test_all_attention_does_not_go_silently(model, job) -> None:
    net = copy.deepcopy(model)
    for module in net.unet.modules():
        if type(module).__name__ == "ResnetBlock2D":
            for p in module.parameters():
                p.data *= 100  # residual layers cost much, transformers little
    share = sum(layer.parameters for layer in layers(net.unet) if layer.kind != "resnet")
    share = share / sum(p.numel() for p in net.unet.parameters())
    with pytest.raises(ConfigError, match="every attention would go"):
        Laptop(remove=share - 1e-4, score="magnitude").sparsify(net, job)


def test_schedulers_without_gradients_are_refused(model) -> None:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    with pytest.raises(ConfigError, match="DDIMScheduler"):
        require_differentiable(DDPMScheduler())
    drawn = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ConfigError, match="stochastic_sampling=False"):
        require_differentiable(drawn)
    clipped = type(model.scheduler).from_config(model.scheduler.config, clip_sample=True)
    with pytest.raises(ConfigError, match="clip_sample=False"):
        require_differentiable(clipped)


def test_networks_with_nothing_to_prune_and_too_few_prompts_are_refused(job) -> None:
    bare = torch.nn.Module()
    bare.unet = torch.nn.Sequential(torch.nn.SiLU())
    with pytest.raises(ConfigError, match="no linear layer or convolution"):
        PruneParts().sparsify(bare)
    with pytest.raises(ConfigError, match="no attention heads and no feed-forward neurons"):
        EcoDiff(score="norm").sparsify(bare)
    with pytest.raises(ConfigError, match="at least two prompts are needed; received 1"):
        prompts_of(job.sample(1), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 2}, "shares keys and values among heads"),
        ({"kv_heads": 4, "qk_norm": "layer_norm_across_heads"}, "over all"),
    ],
)
def test_heads_that_hang_together_are_refused(options: dict[str, object], message: str) -> None:
    from diffusers.models.attention_processor import Attention

    holder = torch.nn.Module()
    holder.attn = Attention(16, heads=4, dim_head=4, **options)
    with pytest.raises(ConfigError, match=message):
        unit_groups(holder)


def test_scores_without_measurements_or_that_are_no_numbers_are_refused(model, job, monkeypatch) -> None:
    """A layer whose inputs were never seen, and inputs that overflowed: nothing is pruned by them."""
    true, net = PruneParts._norms, copy.deepcopy(model)
    name = "unet.mid_block.attentions.0.proj_in.weight"
    method = PruneParts(score="wanda", prompts=2, sampling_steps=1)

    def unseen(self, model, job):
        return {key: norm for key, norm in true(self, model, job).items() if key != name}

    def spoilt(self, model, job):
        return {
            key: norm * torch.nan if key == name else norm for key, norm in true(self, model, job).items()
        }

    for norms, message in ((unseen, name), (spoilt, "NaN")):
        monkeypatch.setattr(PruneParts, "_norms", norms)
        with pytest.raises(SparseError, match=message):
            method.sparsify(net, job)
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), model.parameters(), strict=True))


def test_layers_are_scored_over_the_whole_noise_schedule(model, job) -> None:
    _, times, ids = noisy_images(model, job, 24)
    assert (int(times[0]), int(times[-1])) == (0, 999) and len(times) == len(ids) == 24
    assert int(times.diff().min()) >= 43 and int(times.diff().max()) <= 44


def test_a_text_encoder_of_another_width_is_refused(model) -> None:
    other = TextToImage(side=8, widths=(16, 16), attention=(True, True), text_width=32, text_layers=1)
    with pytest.raises(ConfigError, match="32 wide, and the UNet attends to 16"):
        type(model.pipeline())(other.text_encoder, model.tokenizer, model.unet, model.scheduler)


def test_flows_are_sampled_in_steps_of_one_length(model) -> None:
    """The scheduler's own sigmas of 4 steps end in one of 0.001; these are 1, 3/4, 1/2, 1/4."""
    from zoo.diffusion.flows import MLPFlow

    flow, seen = MLPFlow(width=8, blocks=1), []
    flow.denoise = lambda x, times, condition=None: seen.append(float(times[0])) or torch.ones_like(x)
    made = sample(flow, torch.zeros(1, 1, 8, 8), None, steps=4)
    assert seen == pytest.approx([1000, 750, 500, 250]) and torch.allclose(made, -torch.ones(1, 1, 8, 8))
    with pytest.raises(ConfigError, match="at least 1; received 0"):
        sample(flow, torch.zeros(1, 1, 8, 8), None, steps=0)
