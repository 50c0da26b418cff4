"""Decoding with sparse activations (CHESS), sparse weights, both, and four-bit groups (GQSA), end to end,
against dense.

Random weights of the shapes of Llama-3.2-1B (fp32 and bf16) and of 8B blocks, batch 1 unless said otherwise;
a call is one token through the whole model, cache included. Four distinct layers stand for all sixteen: each
is many times the size of a cache, so that none is read faster for it. Thresholds are calibrated on the model
itself; `skips` is the share of the blocks' weights that they spare tokens like those that are timed. All
weights, dense ones too, lie on huge pages. LLM_DECODE (1b-float32, 1b-bfloat16, 1b-gqsa, 8b-float32,
1b-rival, 8b-rival, 1b-halves-rival) chooses one part of it. The last three are beside llama.cpp
(`_llama_cpp.py`), GQSA in four bits, where OpenVINO (`_openvino_int4.py`) is a rival, too, the others in 16;
these have to be installed where RIVAL_PYTHON and RIVAL_OPENVINO_PYTHON say, and run only when asked for.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's allocator when it is loaded

import copy  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections import defaultdict  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from _llama_cpp import LlamaCpp  # noqa: E402
from _openvino_int4 import OpenVinoInt4  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402

from zoo.llm.gate_statistics import gate_statistics  # noqa: E402
from zoo.llm.methods.chess import chess_thresholds  # noqa: E402
from zoo.llm.models.blocks import find_blocks  # noqa: E402
from zoo.llm.models.one_token import OneTokenLayer  # noqa: E402
from zoo.llm.models.quantised import PackedGroupLinear, replace_module  # noqa: E402
from zoo.llm.models.serving import pack_model  # noqa: E402
from zoo.llm.models.thresholds import attach, held_out_shares, skipped_share  # noqa: E402
from zoo.shared.bench import Bound, Cell, Goal, main  # noqa: E402
from zoo.shared.masks import MaskSet, set_masks  # noqa: E402
from zoo.shared.masks.topk import topk_mask  # noqa: E402
from zoo.shared.measure.activations import ActivationThreshold  # noqa: E402
from zoo.shared.ops import quantise_groups  # noqa: E402
from zoo.shared.store.io import read_json, write_json  # noqa: E402

CONTEXT = 32  # tokens in the cache
SKIPPED = 16  # tokens over which the skipped share is measured


@dataclass(frozen=True)
class Shape:
    """A model's sizes; `distinct` layers are made and used in turn."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    distinct: int


LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 16, 128256, 4)
BLOCKS_8B = Shape("8B blocks", 4096, 14336, 32, 8, 4, 256, 2)
SMALL = Shape("small", 512, 2048, 8, 2, 4, 4096, 2)
PROFILES: dict[str, dict[str, float]] = {}
RIVALS: dict[str, dict[str, Any]] = {}


@dataclass
class Variants:
    """The models that are compared, made from one set of random weights."""

    shape: Shape
    dtype: torch.dtype
    dense: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        shape = self.shape
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.distinct,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            tie_word_embeddings=True,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        rotary = type(model.model.rotary_emb)(config)
        model = model.to_empty(device="cpu").to(self.dtype).eval().requires_grad_(False)
        model.model.rotary_emb = rotary
        model.tie_weights()
        noise = torch.empty(1 << 22).uniform_(-0.035, 0.035).to(self.dtype)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            first = int(torch.randint(1 << 20, ()))  # repeated noise: a tenth of the time of fresh one
            for part in parameter.view(-1).split(1 << 20):
                first = (first + 77_777) % (noise.numel() - part.numel())
                part.copy_(noise[first : first + part.numel()])
        self.dense = model
        self.tokens = torch.randint(shape.vocab, (512,))

    def packed(self, thresholds: dict[str, Tensor], masks: MaskSet | None = None) -> nn.Module:
        """A packed copy that shares what it does not store in another way."""
        memo = {id(parameter): parameter for parameter in self.dense.parameters()}
        if masks is not None:
            masked = {id(self.dense.get_parameter(name)) for name in masks}
            memo = {i: parameter for i, parameter in memo.items() if i not in masked}
        model = copy.deepcopy(self.dense, memo)
        if masks is not None:
            masks.apply_(model)
            set_masks(model, masks)
        return pack_model(attach(model, thresholds) if thresholds else model)

    def grouped(self, head: bool) -> tuple[nn.Module, Bound]:
        """GQSA's W4S50 with half of the groups at random, and the bytes of a token; with `head`, all of the
        output layer in four bits, too, in groups of 32 as llama.cpp's blocks are."""
        model = copy.deepcopy(self.dense, {id(p): p for p in self.dense.parameters()})
        size = 0.0
        for block in find_blocks(model):
            for name, linear in block.linears():
                rows, cols = linear.weight.shape
                keep = torch.rand(rows, cols // 16).argsort(1) < cols // 32
                packed = PackedGroupLinear(quantise_groups(linear.weight, keep))
                size += packed.panels.nbytes * self.shape.layers / self.shape.distinct
                replace_module(model, name, packed)
        if not head:
            return pack_model(model), Bound(size + 4 * self.dense.lm_head.weight.numel(), 0)
        rows, cols = self.dense.lm_head.weight.shape
        keep = torch.ones(rows, cols // 32, dtype=torch.bool)
        packed = PackedGroupLinear(quantise_groups(self.dense.lm_head.weight, keep, 32))
        model.set_output_embeddings(packed)
        return pack_model(model), Bound(size + packed.panels.nbytes, 0)

    def stacked(self, model: nn.Module) -> nn.Module:
        """The model with all its layers, each with its own place in the cache."""
        whole = copy.copy(model)
        whole._modules = dict(model._modules)
        inner = whole._modules["model"] = copy.copy(model.model)
        inner._modules = dict(model.model._modules)
        made, count = model.model.layers, self.shape.layers
        layers = [self._layer(made[i % len(made)], i) for i in range(count)]
        inner._modules["layers"] = nn.ModuleList(layers)
        inner.config = copy.copy(model.model.config)
        inner.config.num_hidden_layers = self.shape.layers
        inner.config.layer_types = ["full_attention"] * self.shape.layers
        return whole

    @staticmethod
    def _layer(layer: nn.Module, index: int) -> nn.Module:
        again = copy.copy(layer)
        again._modules = dict(layer._modules)
        attention = again._modules["self_attn"] = copy.copy(layer.self_attn)
        attention.layer_idx = index
        return again

    def decoding(self, model: nn.Module, batch: int = 1) -> Callable[[], Tensor]:
        """One token after a context of random keys and values, again and again."""
        model, shape = self.stacked(model), self.shape
        cache = DynamicCache()
        for layer in range(shape.layers):
            size = (2, batch, shape.kv_heads, CONTEXT, shape.hidden // shape.heads)
            cache.update(*torch.randn(size, dtype=self.dtype).unbind(), layer)
        turn = [0]

        def token() -> Tensor:
            turn[0] = (turn[0] + batch) % (len(self.tokens) - batch)
            ids = self.tokens[turn[0] : turn[0] + batch].unsqueeze(1)
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache.crop(-1)
            return out.logits[:, -1].argmax(-1)

        return token

    def prefilling(self, model: nn.Module, length: int) -> Callable[[], Any]:
        model = self.stacked(model)
        ids = self.tokens[:length].unsqueeze(0)
        return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def thresholds(self) -> dict[float, dict[str, Tensor]]:
        """CHESS at 50 and 70 %, calibrated on random tokens; in fp32, since bf16 has no fast matrix product
        on many CPUs."""
        windows = [torch.randint(self.shape.vocab, (1, 48)) for _ in range(4)]
        model = self.dense if self.dtype == torch.float32 else copy.deepcopy(self.dense).float()
        statistics = gate_statistics(model, windows[:2], windows[2:], (0.5, 0.7), chunk=2)
        return {share: chess_thresholds(statistics, share) for share in (0.5, 0.7)}

    def masks(self) -> MaskSet:
        """Exactly half of each weight of the blocks, at random: the places do not change the time."""
        weights = {
            name: self.dense.get_parameter(name)
            for block in find_blocks(self.dense)
            for name in block.weight_names()
        }
        return MaskSet(
            {
                name: topk_mask(torch.rand(weight.shape), weight.numel() // 2)
                for name, weight in weights.items()
            }
        )

    def bound(self, skipped: float, kept: float = 1.0) -> Bound:
        """Bytes of the weights that a token cannot do without: a mask bit and a value for each kept one."""
        size = self.dense.lm_head.weight.element_size()
        blocks = sum(p.numel() for p in self.dense.model.layers.parameters())
        blocks *= self.shape.layers / self.shape.distinct
        each = size if kept == 1.0 else kept * size + 1 / 8
        weights = blocks * (1 - skipped)
        return Bound(weights * each + self.dense.lm_head.weight.numel() * size, 0)


def with_thresholds(packed: nn.Module, thresholds: dict[str, Tensor]) -> nn.Module:
    """A copy of a packed model that shares its weights and has other thresholds."""
    tensors = [*packed.parameters(), *packed.buffers()]
    model = copy.deepcopy(packed, {id(t): t for t in tensors if t.numel() > 1 << 16})
    for name, module in model.named_modules():
        if isinstance(module, ActivationThreshold):
            module.threshold = thresholds[name.removesuffix(".threshold")]
    return model


def skips(variants: Variants, model: nn.Module) -> float:
    """Share of the blocks' weights that tokens like the timed ones do not read."""
    return skipped_share(held_out_shares(model, [variants.tokens[None, :SKIPPED]]))


PARTS = (
    ("lm_head", "head"),
    ("gate_proj", "gate"),
    ("mlp", "up and down, activation"),
    ("up_proj", "up and down, activation"),
    ("down_proj", "up and down, activation"),
    ("q_proj", "q and o"),
    ("o_proj", "q and o"),
    ("k_proj", "k and v"),
    ("v_proj", "k and v"),
    ("norm", "norms"),
    ("layernorm", "norms"),
    ("self_attn", "attention itself"),
)


def profile(variants: Variants, model: nn.Module, calls: int = 4) -> dict[str, float]:
    """Milliseconds of a token by part; what no part accounts for is Python, residuals and rotary tables."""
    spent: dict[str, float] = defaultdict(float)
    stack: list[list[float]] = []
    handles = []
    whole: tuple[str, ...] = ()  # layers that call none of their parts
    for name, module in model.named_modules():
        part = next((title for suffix, title in PARTS if name.endswith(suffix)), None)
        if isinstance(module, OneTokenLayer):
            part, whole = "layers", (*whole, f"{name}.")
        if part is None or name.startswith(whole):
            continue

        def before(module: nn.Module, args: Any) -> None:
            stack.append([time.perf_counter(), 0.0])

        def after(module: nn.Module, args: Any, output: Any, part: str = part) -> None:
            start, inner = stack.pop()
            took = time.perf_counter() - start
            spent[part] += took - inner
            if stack:
                stack[-1][1] += took

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    run = variants.decoding(model)
    run()
    spent.clear()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    total = time.perf_counter() - start
    for handle in handles:
        handle.remove()
    spent["everything else"] = total - sum(spent.values())
    return {"total": 1e3 * total / calls} | {part: 1e3 * each / calls for part, each in spent.items()}


def cells_of(shape: Shape, dtype: torch.dtype, goals: dict[str, float], quick: bool) -> Iterator[Cell]:
    """The cells of one shape and dtype."""
    variants = Variants(shape, dtype)
    kind = str(dtype).removeprefix("torch.")
    found = variants.thresholds()
    open_gates = {name: torch.zeros_like(value) for name, value in found[0.5].items()}
    chess = {0.5: variants.packed(found[0.5])}
    chess[0.7] = with_thresholds(chess[0.5], found[0.7])
    dense = {"dense": variants.decoding(variants.dense)}
    labels: dict[str, object] = {"shape": shape.name, "weights": kind, "batch": 1}
    for share, model in chess.items():
        goal = goals.get(f"chess {share}")
        peers = dict(dense)
        if share == 0.5:  # the same kernels and storage, nothing to skip
            peers["nothing skipped"] = variants.decoding(with_thresholds(model, open_gates))
        spared = skips(variants, model)
        yield Cell(
            {**labels, "ours": f"CHESS {share:.0%}", "skips": f"{spared:.1%}"},
            variants.decoding(model),
            peers,
            variants.bound(spared),
            Goal(goal, over=("dense",)) if goal else None,
        )
    if shape.layers > 4 or quick:
        masks = variants.masks()
        weights, both = variants.packed({}, masks), variants.packed(found[0.5], masks)
        goal = goals.get("weights 0.5")
        sparse = {"weights 50%": variants.decoding(weights)}
        yield Cell(
            {**labels, "ours": "weights 50%", "skips": "0.0%"},
            sparse["weights 50%"],
            dense,
            variants.bound(0.0, 0.5),
            Goal(goal) if goal else None,
        )
        spared = skips(variants, both)
        yield Cell(
            {**labels, "ours": "weights 50% + CHESS 50%", "skips": f"{spared:.1%}"},
            variants.decoding(both),
            {**dense, **sparse, "CHESS 50%": variants.decoding(chess[0.5])},
            variants.bound(spared, 0.5),
            Goal(1.0) if goals else None,
        )
        PROFILES[f"{shape.name} {kind} weights 50%"] = profile(variants, weights)
        PROFILES[f"{shape.name} {kind} weights 50% + CHESS 50%"] = profile(variants, both)
    for name, model in (("dense", variants.dense), ("CHESS 50%", chess[0.5])):
        PROFILES[f"{shape.name} {kind} {name}"] = profile(variants, model)
    if dtype == torch.float32 and shape.layers > 4:
        for batch in (4,):
            yield Cell(
                {**labels, "batch": batch, "ours": "CHESS 50%", "skips": ""},
                variants.decoding(chess[0.5], batch),
                {"dense": variants.decoding(variants.dense, batch)},
            )
        yield Cell(
            {**labels, "batch": "prompt of 48", "ours": "CHESS 50%", "skips": ""},
            variants.prefilling(chess[0.5], 48),
            {"dense": variants.prefilling(variants.dense, 48)},
            None,
            Goal(0.95),
        )


def grouped_cells(shape: Shape, goal: float | None) -> Iterator[Cell]:
    """GQSA with the head in fp32 and in four bits, and a prompt."""
    variants = Variants(shape, torch.float32)
    dense = {"dense": variants.decoding(variants.dense)}
    labels: dict[str, object] = {"shape": shape.name, "weights": "float32", "batch": 1, "skips": "50.0%"}
    with_head, bound = variants.grouped(head=True)
    plain, plain_bound = variants.grouped(head=False)
    own = {"W4S50": variants.decoding(plain)}
    required = Goal(goal, over=("dense",)) if goal else None
    yield Cell({**labels, "ours": "GQSA W4S50"}, own["W4S50"], dense, plain_bound, required)
    yield Cell(
        {**labels, "ours": "GQSA W4S50, W4 head"}, variants.decoding(with_head), {**dense, **own}, bound
    )
    yield Cell(
        {**labels, "batch": "prompt of 48", "ours": "GQSA W4S50"},
        variants.prefilling(plain, 48),
        {"dense": variants.prefilling(variants.dense, 48)},
        None,
        Goal(0.95) if goal else None,
    )
    for name, model in (("GQSA W4S50", plain), ("GQSA W4S50, W4 head", with_head)):
        PROFILES[f"{shape.name} float32 {name}"] = profile(variants, model)


def rival_cells(shape: Shape, threads: int) -> Iterator[Cell]:
    """GQSA with a head in four bits, too, beside llama.cpp's Q4_0 and OpenVINO's four bits: a token, and
    prompts."""
    started = {"llama.cpp Q4_0": LlamaCpp.start(shape, "Q4_0", threads)}
    started["OpenVINO int4"] = OpenVinoInt4.start(shape, threads)
    running = {name: rival for name, rival in started.items() if rival is not None}
    if not running:
        return
    variants = Variants(shape, torch.float32)
    model, bound = variants.grouped(head=True)
    del variants.dense
    token, prompts = variants.decoding(model), {n: variants.prefilling(model, n) for n in (64, 512)}
    token()
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    for name, rival in running.items():
        RIVALS[f"{shape.name} {name}"] = {**rival.ready, "peak": rival.peak()}
    RIVALS[f"{shape.name} ours"] = {"held": pages * os.sysconf("SC_PAGE_SIZE")}
    labels: dict[str, object] = {"shape": shape.name, "weights": "four bits", "ours": "GQSA W4S50, W4 head"}
    try:
        peers = {name: rival.token for name, rival in running.items()}
        yield Cell({**labels, "batch": 1}, token, peers, bound, Goal(1 / 0.6))
        for length, prompt in prompts.items():
            peers = {name: functools.partial(rival.prompt, length) for name, rival in running.items()}
            yield Cell({**labels, "batch": f"prompt of {length}"}, prompt, peers, None, Goal(1 / 1.1))
        PROFILES[f"{shape.name} GQSA W4S50, W4 head, {threads} threads"] = profile(variants, model)
    finally:
        for rival in running.values():
            rival.stop()


def halves_rival_cells(shape: Shape, threads: int) -> Iterator[Cell]:
    """Half of the weights, thresholds, and both in bf16 beside llama.cpp's F16 and BF16: a token."""
    started = {kind: LlamaCpp.start(shape, kind, threads) for kind in ("F16", "BF16")}
    running = {f"llama.cpp {kind}": rival for kind, rival in started.items() if rival is not None}
    if not running:
        return
    variants = Variants(shape, torch.bfloat16)
    found, masks = variants.thresholds()[0.5], variants.masks()
    labels: dict[str, object] = {"shape": shape.name, "weights": "bfloat16", "batch": 1}
    peers = {name: rival.token for name, rival in running.items()}
    try:
        for title, thresholds, kept, goal in (
            ("CHESS 50%", found, None, 1 / 0.75),
            ("weights 50%", {}, masks, 1 / 0.75),
            ("weights 50% + CHESS 50%", found, masks, 1 / 0.6),
        ):
            model = variants.packed(thresholds, kept)
            spared = skips(variants, model) if thresholds else 0.0
            bound = variants.bound(spared, 0.5 if kept is not None else 1.0)
            yield Cell({**labels, "ours": title}, variants.decoding(model), peers, bound, Goal(goal))
    finally:
        for rival in running.values():
            rival.stop()


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    """All cells; a quick run has a small model, which is no claim."""
    if quick:
        yield from cells_of(SMALL, torch.float32, {}, quick)
        yield from grouped_cells(SMALL, None)
        yield from rival_cells(SMALL, threads)
        yield from halves_rival_cells(SMALL, threads)
        return
    chosen = os.environ.get("LLM_DECODE", "")
    goals = {"chess 0.5": 1.25, "chess 0.7": 1.45, "weights 0.5": 1.3}
    for name, shape, dtype, promised in (
        ("1b-float32", LLAMA_1B, torch.float32, goals),
        ("1b-bfloat16", LLAMA_1B, torch.bfloat16, goals),
        ("8b-float32", BLOCKS_8B, torch.float32, {"chess 0.5": 1.38}),
    ):
        if chosen in ("", name):
            yield from cells_of(shape, dtype, promised, quick)
    if chosen in ("", "1b-gqsa"):
        yield from grouped_cells(LLAMA_1B, 3.0)
    for name, shape in (("1b-rival", LLAMA_1B), ("8b-rival", BLOCKS_8B)):
        if chosen == name:
            yield from rival_cells(shape, threads)
    if chosen == "1b-halves-rival":
        yield from halves_rival_cells(LLAMA_1B, threads)


def write_profiles(path: str) -> None:
    """Add the profiles to the results, and print them."""
    parts = list(dict.fromkeys(part for profile in PROFILES.values() for part in profile))
    width = max(map(len, PROFILES), default=0)
    print("\nmilliseconds of a token, by part")
    for name, found in PROFILES.items():
        print(f"{name:<{width}}  " + ", ".join(f"{part} {found.get(part, 0):.1f}" for part in parts))
    if path:
        write_json(path, read_json(path) | {"profile_ms": PROFILES, "rivals": RIVALS})


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    # A rival's time is another process's, whose threads spin on for a while when its turn ends.
    rivals = os.environ.get("LLM_DECODE", "").endswith("rival")
    clock, block_seconds = (time.perf_counter, 1.0) if rivals else (None, 0.02)
    subject = "decoding of sparse language models against dense ones"
    status = main(subject, cells, clock=clock, block_seconds=block_seconds)
    arguments = sys.argv[1:]
    write_profiles(arguments[arguments.index("--json") + 1] if "--json" in arguments else "")
    sys.exit(status)
