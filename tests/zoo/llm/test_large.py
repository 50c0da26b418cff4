"""Pruning from shards equals pruning in memory, with one block in memory at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from zoo.errors import ConfigError
from zoo.llm.families import family, token_ids
from zoo.llm.large import BlockStore, Large, Shards, fill, skeleton, write_random
from zoo.llm.methods.wanda import wanda_pruner
from zoo.llm.pruning import prune_blocks
from zoo.shared.masks.patterns import parse_pattern


@pytest.mark.parametrize("method,pattern", [("wanda", "2:4"), ("sparsegpt", "unstructured")])
def test_from_shards_equals_in_memory(tmp_path, method, pattern):
    from zoo.llm.methods.sparsegpt import sparsegpt_pruner

    sparsity = None if pattern == "2:4" else 0.5
    config = Large(
        tmp_path / "out",
        random="tiny",
        method=method,
        pattern=pattern,
        sparsity=sparsity,
        windows=3,
        length=16,
    )
    done = config.run()
    assert done["zeros"] == 0.5 and done["peak_bytes"] > 0
    write_random("tiny", tmp_path / "source")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    ids = torch.randint(512, (3, 16), generator=torch.Generator().manual_seed(0))
    pruner = wanda_pruner if method == "wanda" else sparsegpt_pruner
    prune_blocks(expected, list(ids.split(1)), pruner(parse_pattern(pattern), 0.5))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, weight in expected.state_dict().items():
        if name != "lm_head.weight":  # tied
            assert torch.equal(found.state_dict()[name], weight.bfloat16()), name


def test_a_mixture_whose_folder_holds_single_experts(tmp_path):
    """transformers fuses the experts as it loads and takes them apart as it saves; so does the zoo."""
    from safetensors import safe_open

    family("mixtral").save_pretrained(tmp_path / "source")
    masked, out = family("mixtral"), tmp_path / "out"
    shards = Shards(tmp_path / "source")
    assert any(".experts.3.w2." in name for name in shards.files), "the case at hand"
    model = skeleton(tmp_path / "source")
    out.mkdir()
    store = BlockStore(model, shards, out)
    ids = token_ids(2)
    fill(model, {name: shards.read(name) for name, _ in model.named_parameters() if ".layers." not in name})
    pruner = wanda_pruner(parse_pattern("unstructured"), 0.5)
    prune_blocks(model, ids, pruner, opened=store.opened, collect=False)
    store.finish()
    prune_blocks(masked, ids, pruner)
    (out / "config.json").write_text((tmp_path / "source" / "config.json").read_text())
    found = AutoModelForCausalLM.from_pretrained(out)
    for name, weight in masked.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    names = set(store.weight_map)
    assert names == set(shards.files), "the same tensors by the same names"
    with safe_open(out / next(iter(store.weight_map.values())), "pt") as shard:
        assert set(shard.keys()) <= names


def test_only_one_block_is_in_memory(tmp_path):
    write_random("tiny", tmp_path)
    (tmp_path / "out").mkdir()
    model = skeleton(tmp_path)
    store = BlockStore(model, Shards(tmp_path), tmp_path / "out")
    assert all(parameter.is_meta for parameter in model.parameters())
    with store.opened("model.layers.1"):
        there = {name for name, weight in model.named_parameters() if not weight.is_meta}
        assert there and all(name.startswith("model.layers.1.") for name in there)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="either a source folder or --random"):
        Large(tmp_path / "out", sparsity=0.5).run()
    with pytest.raises(ConfigError, match="unknown shape"):
        Large(tmp_path / "out", random="gigantic", sparsity=0.5).run()
    with pytest.raises(ConfigError, match="needs a sparsity"):
        Large(tmp_path / "new", random="tiny").run()
    with pytest.raises(ConfigError, match="neither model.safetensors"):
        Shards(tmp_path)
    (tmp_path / "out" / "x").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        Large(tmp_path / "out", random="tiny", sparsity=0.5).run()
    write_random("tiny", tmp_path)
    with pytest.raises(ConfigError, match="no tensor 'foo'"):
        Shards(tmp_path).read("foo")
    layer = torch.nn.Linear(2, 3, device="meta")
    fill(layer, {"weight": torch.ones(3, 2).half()})
    assert layer.weight.dtype == torch.float32
