"""llama.cpp beside the zoo: a model of the same shape and random weights, run in a process of its own.

    rival = LlamaCpp.start(shape, "Q4_0", threads)     # None where there is none; says why
    rival.token(); rival.prompt(64)

The process is the interpreter that the environment variable RIVAL_PYTHON names (this one by default), which
needs `pip install xllamacpp gguf`. It writes the model as a GGUF file into a temporary folder, loads it, and
then does what it is told, a line of JSON at a time, so that its turns alternate with ours in one run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _process import Rival, answer

_CONTEXT = 1024


class LlamaCpp(Rival):
    """The running process, as seen from the zoo's."""

    @classmethod
    def start(cls, shape: Any, kind: str, threads: int) -> LlamaCpp | None:
        """A process that has loaded a model of this shape (`llm_decode.Shape`), its weights in blocks of
        `kind` ("Q4_0", "Q8_0", "F16"); None, and a line that says so, where llama.cpp is not installed."""
        python = os.environ.get("RIVAL_PYTHON", sys.executable)
        names = ("hidden", "ffn", "heads", "kv_heads", "layers", "vocab")
        sizes = {name: getattr(shape, name) for name in names}
        return cls.launch(
            [python, __file__, json.dumps({**sizes, "kind": kind, "threads": threads})], "xllamacpp gguf"
        )


def write_model(path: Path, shape: dict[str, Any]) -> None:
    """A LLaMA of these sizes with random weights; a tied head."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[shape["kind"]]
    hidden, head = shape["hidden"], shape["hidden"] // shape["heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["ffn"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(shape["vocab"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{i}" for i in range(shape["vocab"])])
    writer.add_token_scores([0.0] * shape["vocab"])
    writer.add_token_types([1] * shape["vocab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    noise = np.random.default_rng(0).uniform(-0.035, 0.035, (1024, 1024)).astype(np.float32)
    known: dict[int, np.ndarray] = {}  # rows of noise, coded once

    def add(name: str, rows: int, columns: int) -> None:
        if columns not in known:
            block = np.resize(noise, (1024, columns))
            known[columns] = gguf.quants.quantize(block, kind)
        coded = known[columns]
        turned = np.roll(coded, len(name) * 17 + rows, axis=0)
        writer.add_tensor(name, np.resize(turned, (rows, coded.shape[1])), raw_dtype=kind)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))

    add("token_embd.weight", shape["vocab"], hidden)
    add_norm("output_norm.weight")
    for i in range(shape["layers"]):
        add_norm(f"blk.{i}.attn_norm.weight")
        add_norm(f"blk.{i}.ffn_norm.weight")
        add(f"blk.{i}.attn_q.weight", hidden, hidden)
        add(f"blk.{i}.attn_k.weight", head * shape["kv_heads"], hidden)
        add(f"blk.{i}.attn_v.weight", head * shape["kv_heads"], hidden)
        add(f"blk.{i}.attn_output.weight", hidden, hidden)
        add(f"blk.{i}.ffn_gate.weight", shape["ffn"], hidden)
        add(f"blk.{i}.ffn_up.weight", shape["ffn"], hidden)
        add(f"blk.{i}.ffn_down.weight", hidden, shape["ffn"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(shape: dict[str, Any]) -> None:
    """Load the model and answer requests until there are no more."""
    try:
        import gguf  # noqa: F401
        import xllamacpp
    except ImportError as error:
        print(json.dumps({"missing": error.name}), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write = subprocess.run([sys.executable, __file__, json.dumps({**shape, "write": str(path)})])
        if write.returncode:
            sys.exit("the GGUF file could not be written")
        size = path.stat().st_size
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel = _CONTEXT, 1
        for each in (parameters.cpuparams, parameters.cpuparams_batch):
            each.n_threads = shape["threads"]
        parameters.warmup = True
        server = xllamacpp.Server(parameters)

    def seconds_of(length: int, cached: bool) -> float:
        request = {
            "prompt": [3 + 7 * i % 1000 for i in range(length)],
            "n_predict": 1,
            "cache_prompt": cached,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        return float(server.handle_completions(request)["timings"]["prompt_ms"]) / 1e3

    answer({"bytes": size, "version": xllamacpp.__version__}, seconds_of)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "write" in given:  # a process of its own, whose memory goes when it ends
        write_model(Path(given["write"]), given)
    else:
        serve(given)
