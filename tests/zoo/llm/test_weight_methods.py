"""The weight methods as `zoo sparsify` runs them: bundles of a tiny model, masked and packed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.bundles.store import load, save
from zoo.cli import main
from zoo.errors import ConfigError, DataError
from zoo.llm.data.calibration import Calibrated, default_text, random_windows
from zoo.llm.models import architecture_of, llama
from zoo.llm.models.quantised import GroupQuantLinear, PackedGroupLinear
from zoo.registry import METHODS
from zoo.shared import ops
from zoo.shared.masks import masks_of
from zoo.shared.ops import SparseLinear
from zoo.shared.train import Job

SMALL = {"windows": 4, "length": 32}
# Of packed and masked execution: sums in another order, and for GQSA products of rounded weights.
TOLERANCE = 1e-4


def tiny(seed: int = 0):
    """A random model with the packaged tokenizer, weights in half precision as in bundles."""
    torch.manual_seed(seed)
    model = llama(1024, 32, 64, 2, 4, 2, context=64, tokenizer="shakespeare").eval()
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay in single precision
        parameter.data = parameter.data.half()
    return model


@pytest.fixture
def save_made(card_of):
    """Writes the bundle of a model, or of what a method made."""

    def write(folder, model, made=None):
        architecture, more = architecture_of(model), {}
        if made is not None:
            architecture = {"name": "llm/llama", "args": made.arguments or architecture["args"]}
            more = {"masks": made.masks, "extras": made.extras}
        parts = {} if made is None else {"sparsity": {"parts": made.parts}}
        fields = card_of(f"llm/{folder.name}", architecture, "llm/embedded", "word_perplexity", **parts)
        return save(model, folder, card=fields, **more)

    return write


IDS = torch.arange(24).view(2, 12) + 7


def logits(model):
    with torch.no_grad():
        return model.float()(IDS, use_cache=False).logits


@pytest.mark.usefixtures("packs_all")
@pytest.mark.parametrize(
    "name,options",
    [
        ("wanda", {"sparsity": 0.5}),
        ("wanda", {"pattern": "2:4"}),
        ("sparsegpt", {"sparsity": 0.6}),
        ("sparsegpt", {"pattern": "2:4"}),
        ("ecoflap", {"sparsity": 0.6}),
        ("ecoflap", {"sparsity": 0.5, "coarse": "first", "local": "sparsegpt"}),
    ],
)
def test_masked_and_packed_bundles_agree(save_made, tmp_path, name, options):
    made = METHODS.get(name)(**SMALL, **options).sparsify(tiny())
    assert made.masks.sparsity() == pytest.approx(options.get("sparsity", 0.5), abs=0.02)
    path = save_made(tmp_path / "made", made.model, made)
    masked, packed = load(path), load(path, execution="packed")
    assert masks_of(masked).equal(made.masks) and masks_of(masked).lost_zeros(masked) == []
    skipping = [module for module in packed.modules() if isinstance(module, SparseLinear)]
    assert len(skipping) >= 7  # ECoFLaP leaves blocks below one half, where packing does not pay
    if "pattern" in options:
        assert all(module.width == 4 for module in skipping)
    torch.testing.assert_close(logits(packed), logits(masked), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_cut_bundle_is_smaller_and_comes_back(save_made, tmp_path):
    dense = tiny()
    made = METHODS.get("cfsp")(ratio=0.4, **SMALL).sparsify(tiny())
    path = save_made(tmp_path / "made", made.model, made)
    again = load(path)
    widths = [layer.mlp.up_proj.out_features for layer in again.model.layers]
    assert widths == made.hyperparameters["widths"] and sum(widths) < 0.62 * 128
    part = made.parts["ffn channels"]
    assert (part["kept"], part["total"]) == (sum(widths), 128)
    fewer = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in again.parameters())
    assert fewer == (128 - sum(widths)) * 3 * 32
    assert torch.equal(logits(again), logits(made.model))


def same_but_for_rounding(packed: nn.Module, masked: nn.Module) -> None:
    """The same codes; kernels round what they meet to eight bits, the dense product does not."""
    expected = logits(masked)
    with ops.backend("dense"):
        torch.testing.assert_close(logits(packed), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert float((logits(packed) - expected).norm()) < 0.02 * float(expected.norm())


def test_a_quantised_bundle_holds_codes_and_comes_back(save_made, tmp_path):
    made = METHODS.get("gqsa")(block_epochs=1, model_epochs=1, **SMALL).sparsify(tiny())
    path = save_made(tmp_path / "made", made.model, made)
    masked, packed = load(path), load(path, execution="packed")
    assert sum(isinstance(module, GroupQuantLinear) for module in masked.modules()) == 14
    assert sum(isinstance(module, PackedGroupLinear) for module in packed.modules()) == 14
    from zoo.bundles.catalog import find

    cost, part = find(path).card.cost, find(path).card.sparsity.parts["groups"]
    # half the groups, their scales, the embedding and the norms
    assert part.kept * 2 == part.total and part.pattern == "block1x16"
    assert cost.parameters.kept == 17 * part.kept + 1024 * 32 + 5 * 32
    torch.testing.assert_close(logits(masked), logits(made.model))
    same_but_for_rounding(packed, masked)


def test_a_head_in_four_bits_leaves_the_embedding_alone_and_comes_back(save_made, tmp_path):
    dense = tiny()
    embedding = dense.get_input_embeddings().weight.detach().clone()
    method = METHODS.get("gqsa")(block_epochs=0, model_epochs=0, head=True, **SMALL)
    made = method.sparsify(dense)
    path = save_made(tmp_path / "made", made.model, made)
    masked, packed = load(path), load(path, execution="packed")
    assert torch.equal(masked.get_input_embeddings().weight, embedding)
    assert isinstance(packed.lm_head, PackedGroupLinear) and packed.lm_head.panels.groups().density == 1.0
    head = masked.lm_head.weight
    span = (embedding.view(1024, 2, 16).amax(-1) - embedding.view(1024, 2, 16).amin(-1)).float()
    off = (head - embedding.float()).detach().view(1024, 2, 16).abs().amax(-1)
    assert bool((off <= 0.04 * span + 1e-3).all()) and not torch.equal(head, embedding.float())
    same_but_for_rounding(packed, masked)


def test_the_command_line_makes_and_measures(save_made, tmp_path, monkeypatch):
    from zoo.llm.data import corpus

    text = corpus("embedded")
    short = text.__class__(**{**text.__dict__, "test": text.test[:2], "train": text.train[:20]})
    monkeypatch.setattr("zoo.llm.data.corpus", lambda name: short)
    monkeypatch.setattr("zoo.llm.tasks.corpus", lambda name: short)
    source = save_made(tmp_path / "dense", tiny())
    out = tmp_path / "wanda"
    arguments = [
        "sparsify",
        str(source),
        "--method",
        "wanda",
        "--pattern",
        "2:4",
        "--windows",
        "2",
        "--length",
        "32",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    from zoo.bundles.catalog import find

    made = find(out).card
    assert made.method.name == "wanda" and made.sparsity.parts["weights"].pattern == "2:4"
    assert made.metrics[0].dense is not None and made.metrics[0].value > 1
    assert made.cost.flops.sparse < made.cost.flops.dense


def test_every_seed_draws_its_own_windows_and_the_same_again():
    tokens = torch.arange(1000)
    first, again, other = (random_windows(tokens, 5, 16, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (5, 16) and torch.equal(first.diff(), torch.ones(5, 15, dtype=torch.long))


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match="has 10 tokens, a window 16"):
        random_windows(torch.arange(10), 1, 16, 0)
    with pytest.raises(ConfigError, match="at least 1"):
        random_windows(torch.arange(10), 0, 4, 0)


def test_windows_are_as_long_as_the_context_allows_and_come_from_a_text_of_ones_own(tmp_path):
    assert default_text(tiny()) == "embedded"
    assert Calibrated(length=128, windows=3).sample(tiny()).batches[0].shape == (3, 64)
    (tmp_path / "mine.txt").write_text("one two three four\n\n" * 400)
    (tmp_path / "mine.jsonl").write_text("\n".join(['{"text": "one two three four"}'] * 100))
    for name in ("mine.txt", "mine.jsonl"):
        data = Calibrated(text=str(tmp_path / name), windows=10, length=16).sample(tiny())
        assert [batch.shape for batch in data.batches] == [(8, 16), (2, 16)]
    (tmp_path / "bad.jsonl").write_text('{"title": "no text"}')
    with pytest.raises(DataError, match="bad.jsonl cannot be read.*objects with"):
        Calibrated(text=str(tmp_path / "bad.jsonl")).sample(tiny())


def test_a_job_brings_batches_of_its_own_and_runs_any_network():
    job = Job([torch.randint(90, (4, 12)) for _ in range(5)])
    data = Calibrated(windows=8).sample(tiny(), job)
    assert [batch.shape for batch in data.batches] == [(4, 12), (4, 12)]
    with pytest.raises(ConfigError, match="Cats calibrates a language model"):
        METHODS.get("cats")().sparsify(tiny(), Job([(torch.randn(4, 3), torch.zeros(4))]))


@pytest.mark.parametrize("name,options", [("wanda", {}), ("sparsegpt", {}), ("ecoflap", {"eps": 0.01})])
def test_a_vision_transformer_is_pruned_on_its_own_loss(name, options):
    timm = pytest.importorskip("timm", reason="timm is an extra that this environment lacks")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.models.VisionTransformer(**sizes).eval()
    job = Job([(torch.randn(4, 3, 16, 16), torch.randint(3, (4,))) for _ in range(2)])
    made = METHODS.get(name)(sparsity=0.75, windows=8, **options).sparsify(model, job)
    assert len(made.masks) == 8 and all("blocks." in name for name in made.masks)
    total = sum(mask.numel for mask in made.masks.values())
    assert sum(mask.kept for mask in made.masks.values()) * 4 == total


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_a_sparsity_is_needed(name):
    with pytest.raises(ConfigError, match="needs a sparsity"):
        METHODS.get(name)().sparsify(tiny())


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "ecoflap", "gqsa"])
def test_sparsities_out_of_range_are_refused(name):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        METHODS.get(name)(sparsity=1.2, **SMALL).sparsify(tiny())


def test_unequal_widths_need_an_architecture_that_has_them():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.config.zoo_tokenizer = "shakespeare"
    with pytest.raises(ConfigError, match="coarse=uniform"):
        METHODS.get("cfsp")(ratio=0.4, **SMALL).sparsify(model)
    made = METHODS.get("cfsp")(ratio=0.5, coarse="uniform", **SMALL).sparsify(model)
    assert made.arguments["config"]["intermediate_size"] == 32
