"""Pruning from shards equals pruning in memory, with one block in memory at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from zoo.errors import ConfigError
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
