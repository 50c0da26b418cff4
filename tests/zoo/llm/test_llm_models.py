"""Language models: families that are recognised, folders, bundles with tokenizers, llama2.c checkpoints."""

from __future__ import annotations

import copy
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from zoo.bundles.store import load, save
from zoo.errors import BundleError, ConfigError, DataError, UnknownNameError
from zoo.llm.data.tokenization import packaged, remember, to_extras, tokenizer_of, wrap
from zoo.llm.models import architecture_of, from_config, llama, load_pretrained
from zoo.llm.models.blocks import find_blocks
from zoo.llm.models.llama2c import read_llama2c
from zoo.shared.measure.modes import float32

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
OTHER_SIZES = {
    "gpt2": {"vocab_size": 64, "n_layer": 1, "n_embd": 32, "n_head": 4},
    "opt": {
        "vocab_size": 64,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "word_embed_proj_dim": 32,
        "num_attention_heads": 4,
    },
    "phi3": SIZES,
    "mixtral": SIZES,
}


def foreign(kind: str, **sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes or SIZES))).eval()


def words_tokenizer(count: int):
    names = {f"w{i}": i for i in range(count)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(tokenizer, bos_token="w0", eos_token="w0", unk_token="w1")


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6) if ids is None else ids).logits


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_gated_families_are_recognised_and_built_again(kind):
    model = foreign(kind)
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    parameters = dict(model.named_parameters())
    for block in blocks:
        assert all(
            parameters[name] is linear.weight
            for name, (_, linear) in zip(block.weight_names(), block.linears(), strict=True)
        )
        x = torch.randn(3, 32)
        by_hand = block.down(block.activation(block.gate(x)) * block.up(x))
        assert torch.equal(block.mlp(x), by_hand)
    described = architecture_of(model)
    assert described["name"] == ("llm/llama" if kind == "llama" else "llm/transformers")
    build = llama if kind == "llama" else from_config
    again = build(**described["args"]).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "kind, named", [("gpt2", "c_fc"), ("opt", "fc1"), ("phi3", "gate_up_proj"), ("mixtral", "experts")]
)
def test_other_ffns_are_refused_by_name(kind, named):
    with pytest.raises(ConfigError, match=f"{named}.*gated FFN"):
        find_blocks(foreign(kind, **OTHER_SIZES[kind]))


def test_no_decoder_at_all_is_refused():
    with pytest.raises(ConfigError, match="no stack of decoder layers"):
        find_blocks(torch.nn.Linear(2, 2))


def test_a_folder_loads_with_its_tokenizer_and_keeps_its_outputs(tmp_path):
    model = foreign("qwen3")
    model.save_pretrained(tmp_path)
    words_tokenizer(64).save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer_of(loaded).decode(tokenizer_of(loaded)("w5 w7").input_ids) == "w5 w7"


def test_folders_that_cannot_be_loaded_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no config.json"):
        load_pretrained(tmp_path)
    model = foreign("llama")
    model.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load_pretrained(tmp_path / "pickled", tokenizer=False)
    model.save_pretrained(tmp_path / "mute")
    with pytest.raises(ConfigError, match="tokenizer"):
        load_pretrained(tmp_path / "mute")
    words_tokenizer(65).save_pretrained(tmp_path / "mute")
    with pytest.raises(ConfigError, match="65 tokens, the model 64: it does not fit"):
        load_pretrained(tmp_path / "mute")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ConfigError, match="no-such-model"):
        load_pretrained(tmp_path / "unknown")


@pytest.fixture
def toy_card(card_of):
    """Makes the card of a language model."""
    return lambda model: card_of("llm/toy", architecture_of(model), "llm/embedded", "word_perplexity", 9.0)


def test_bundles_carry_a_foreign_tokenizer(tmp_path, toy_card):
    model = foreign("gemma")
    remember(model, words_tokenizer(60))
    save(model, tmp_path / "m", card=toy_card(model), extras=to_extras(tokenizer_of(model)))
    loaded = load(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer_of(loaded)("w5 nothing").input_ids == [5, 1]
    assert tokenizer_of(loaded).bos_token_id == 0
    twin = copy.deepcopy(loaded)
    assert twin.load_extras.args[0] is twin and tokenizer_of(twin)("w5").input_ids == [5]


def test_a_stored_tokenizer_that_does_not_fit_is_refused(tmp_path, toy_card):
    model = foreign("llama")
    broken = to_extras(words_tokenizer(60)) | {"tokenizer/json": torch.arange(9, dtype=torch.uint8)}
    for extras, message in (
        (to_extras(words_tokenizer(65)), "does not fit"),
        (broken, "tokenizer cannot be read"),
    ):
        with pytest.raises(BundleError, match=message):  # saving proves that the bundle loads
            save(model, tmp_path / "m", card=toy_card(model), extras=extras)
    assert not (tmp_path / "m").exists()


def test_cut_widths_are_part_of_the_architecture(tmp_path, toy_card):
    model = llama(1024, 32, [48, 16], layers=2, heads=4, kv_heads=2, tokenizer="shakespeare").eval()
    assert architecture_of(model)["args"]["intermediate_size"] == [48, 16]
    save(model.half(), tmp_path / "m", card=toy_card(model))
    loaded = load(tmp_path / "m")
    assert [block.down.in_features for block in find_blocks(loaded)] == [48, 16]
    assert loaded.model.embed_tokens.weight is loaded.lm_head.weight and loaded.dtype == torch.float16
    assert tokenizer_of(loaded) is packaged("shakespeare")


def test_impossible_shapes_and_tokenizers_are_refused():
    with pytest.raises(ConfigError, match="width for each of 2 layers"):
        llama(64, 32, [48], layers=2, heads=4)
    with pytest.raises(ConfigError, match="must divide hidden_size"):
        llama(64, 30, 48, layers=2, heads=4)
    with pytest.raises(ConfigError, match="does not fit"):
        llama(64, 32, 48, layers=1, heads=4, tokenizer="shakespeare")
    with pytest.raises(UnknownNameError, match="shakespeare"):
        packaged("shakespear")
    with pytest.raises(UnknownNameError):
        packaged("../cards/dense-shakespeare/card")
    with pytest.raises(ConfigError, match="no-such"):
        from_config({"model_type": "no-such"})
    with pytest.raises(ConfigError, match="has no tokenizer"):
        tokenizer_of(foreign("llama"))


@pytest.mark.parametrize(
    "field",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel"},
        {"auto_map": {"AutoModelForCausalLM": "somebody/code--modeling.Model"}},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"no_such_field": 1},
        {"transformers_version": "5.0"},
    ],
)
def test_a_configuration_sets_sizes_and_nothing_that_names_code(field):
    with pytest.raises(ConfigError, match=f"no field '{next(iter(field))}' that a card may set"):
        from_config({"model_type": "qwen2", **field})


def test_a_number_of_layers_that_no_model_has():
    with pytest.raises(ConfigError, match="between 1 and 4096, received 10000000000"):
        llama(64, 32, 48, layers=10**10, heads=4)


def test_half_weights_compute_in_single_precision_and_come_back():
    model = llama(64, 32, 48, layers=2, heads=4, kv_heads=2, context=64).half().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with float32(model):
        assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
        inside = logits(model)
    assert model.dtype == torch.float16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(inside, logits(copy.deepcopy(model).float()))
    with pytest.raises(ZeroDivisionError), float32(model):
        1 / 0  # noqa: B018
    assert model.dtype == torch.float16


def test_a_sparse_model_generates_in_batches_and_saves_as_transformers_does(tmp_path):
    model = llama(64, 32, 48, layers=2, heads=4, kv_heads=2, context=64).eval()
    prompts = torch.randint(1, 64, (3, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ones = torch.ones_like(prompts)
    with_cache = model.generate(prompts, attention_mask=ones, **options)
    without = model.generate(prompts, attention_mask=ones, use_cache=False, **options)
    single = torch.cat([model.generate(p[None], attention_mask=ones[:1], **options) for p in prompts])
    assert torch.equal(with_cache, without) and torch.equal(with_cache, single)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pretrained(tmp_path, tokenizer=False)), logits(model))


DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, CONTEXT = 16, 24, 2, 4, 2, 40, 12


def llama2c_file(path: Path, tied: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Write a random llama2.c checkpoint; returns its arrays."""
    generator = np.random.default_rng(seed)
    head = DIM // HEADS
    shapes = {
        "embedding": (VOCAB, DIM),
        "attention_norm": (LAYERS, DIM),
        "wq": (LAYERS, DIM, DIM),
        "wk": (LAYERS, KV * head, DIM),
        "wv": (LAYERS, KV * head, DIM),
        "wo": (LAYERS, DIM, DIM),
        "ffn_norm": (LAYERS, DIM),
        "w1": (LAYERS, HIDDEN, DIM),
        "w2": (LAYERS, DIM, HIDDEN),
        "w3": (LAYERS, HIDDEN, DIM),
        "norm": (DIM,),
        "rotary": (2, CONTEXT, head // 2),
    } | ({} if tied else {"head": (VOCAB, DIM)})
    arrays = {n: (generator.normal(size=s) * 0.4).astype("<f4") for n, s in shapes.items()}
    sizes = (DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB if tied else -VOCAB, CONTEXT)
    path.write_bytes(struct.pack("<7i", *sizes) + b"".join(a.tobytes() for a in arrays.values()))
    return arrays


def numpy_logits(arrays: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """A plain forward pass: neighbouring channels are rotary pairs, base 10000, norm eps 1e-5."""
    a = {name: value.astype(np.float64) for name, value in arrays.items()}
    dim, head = a["embedding"].shape[1], DIM // HEADS
    if a["wq"].shape[1] != DIM:
        raise AssertionError("written for the sizes above")

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def rotate(x):  # [tokens, heads, head]
        angle = np.arange(len(ids))[:, None] * 10000.0 ** (-np.arange(0, head, 2) / head)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = a["embedding"][ids]
    for layer in range(LAYERS):
        h = norm(x, a["attention_norm"][layer])
        q = rotate((h @ a["wq"][layer].T).reshape(len(ids), HEADS, head))
        k = rotate((h @ a["wk"][layer].T).reshape(len(ids), KV, head)).repeat(HEADS // KV, 1)
        v = (h @ a["wv"][layer].T).reshape(len(ids), KV, head).repeat(HEADS // KV, 1)
        score = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head)
        score = np.where(np.tri(len(ids), dtype=bool), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weight, v).reshape(len(ids), dim) @ a["wo"][layer].T
        h = norm(x, a["ffn_norm"][layer])
        gate = h @ a["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ a["w3"][layer].T)) @ a["w2"][layer].T
    return norm(x, a["norm"]) @ a.get("head", a["embedding"]).T


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_equals_a_plain_forward_pass(tmp_path, tied):
    arrays = llama2c_file(tmp_path / "m.bin", tied)
    model = read_llama2c(tmp_path / "m.bin")
    ids = [1, 5, 39, 0, 7, 7, 21]
    found = logits(model.double(), torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(found, numpy_logits(arrays, ids), rtol=1e-5, atol=1e-6)


def test_llama2c_files_that_are_not_whole_are_refused(tmp_path):
    path = tmp_path / "m.bin"
    llama2c_file(path, tied=True)
    content = path.read_bytes()
    for broken, message in (
        (content[:-4], "has .* bytes; a llama2.c checkpoint of its sizes has"),
        (content + b"....", "of its sizes has"),
        (content[:20], "too short"),
        (b"\x00" * 4000, "no llama2.c checkpoint of version 0"),
        (b"GGUF" * 1000, "llama2.c"),
    ):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=message):
            read_llama2c(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_llama2c(tmp_path / "absent.bin")
    llama2c_file(path, tied=True)
    (tmp_path / "t.bin").write_bytes(struct.pack("<i", 5) + struct.pack("<fi", 0.0, 2) + b"ab")
    with pytest.raises(DataError, match="no llama2.c tokenizer of 40 tokens"):
        read_llama2c(path, tmp_path / "t.bin")


@pytest.mark.skipif(not os.environ.get("ZOO_DATA"), reason="the checkpoint is in ZOO_DATA")
def test_the_real_checkpoint_tells_its_story():
    folder = Path(os.environ["ZOO_DATA"]) / "stories260k"
    model = read_llama2c(folder / "stories260K.bin", folder / "tok512.bin")
    tokenizer = tokenizer_of(model)
    prompt = torch.tensor([[1, *tokenizer("Once upon a time", add_special_tokens=False).input_ids]])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")
    assert tokenizer.decode(tokenizer("naïve — 猫!").input_ids, skip_special_tokens=True) == "naïve — 猫!"
