"""OpenVINO's four bits beside the zoo: a model of the same shape and random weights, run in a process of its
own.

    rival = OpenVinoInt4.start(shape, threads)     # None where there is none; says why
    rival.token(); rival.prompt(64)

The process is the interpreter that the environment variable RIVAL_OPENVINO_PYTHON names (this one by
default), which needs `pip install optimum-intel nncf openvino`. It exports a LLaMA of transformers with
optimum-intel, whose weights nncf codes in symmetric groups of 32 with four bits (the head, too), into the
stateful model that OpenVINO GenAI runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _process import Rival, answer

_MOST = 128  # tokens in the cache, from which it begins anew: a token in about a hundred waits for that


class OpenVinoInt4(Rival):
    """The running process, as seen from the zoo's."""

    @classmethod
    def start(cls, shape: Any, threads: int) -> OpenVinoInt4 | None:
        """A process that has loaded a model of this shape (`llm_decode.Shape`); None, and a line that says
        so, where OpenVINO is not installed."""
        python = os.environ.get("RIVAL_OPENVINO_PYTHON", sys.executable)
        names = ("hidden", "ffn", "heads", "kv_heads", "layers", "vocab")
        sizes = {name: getattr(shape, name) for name in names}
        return cls.launch(
            [python, __file__, json.dumps({**sizes, "threads": threads})], "optimum-intel nncf openvino"
        )


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """A LLaMA of these sizes with random weights and a tied head, in four bits."""
    import nncf
    import openvino
    import torch
    from optimum.exporters.openvino import export_from_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    task = "text-generation-with-past"
    export_from_model(model, folder / "single", task=task, stateful=True, preprocessors=None)
    del model
    plain = openvino.Core().read_model(folder / "single" / "openvino_model.xml")
    mode = nncf.CompressWeightsMode.INT4_SYM
    coded = nncf.compress_weights(plain, mode=mode, ratio=1.0, group_size=32, all_layers=True)
    openvino.save_model(coded, folder / "model.xml")


def serve(shape: dict[str, Any]) -> None:
    """Load the model and answer requests until there are no more."""
    try:
        import nncf  # noqa: F401
        import numpy as np
        import openvino
        import optimum.intel  # noqa: F401
    except ImportError as error:
        print(json.dumps({"missing": error.name}), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        write = subprocess.run(
            [sys.executable, __file__, json.dumps({**shape, "write": folder})], stdout=subprocess.DEVNULL
        )
        if write.returncode:
            sys.exit("the model could not be exported")
        size = (Path(folder) / "model.bin").stat().st_size
        options = {"INFERENCE_NUM_THREADS": shape["threads"], "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        core = openvino.Core()
        compiled = core.compile_model(Path(folder) / "model.xml", "CPU", options)
        request = compiled.create_infer_request()
    names = {each.get_any_name() for each in compiled.inputs}

    def run(first: int, count: int) -> float:
        tokens = np.array([[3 + 7 * i % 1000 for i in range(first, first + count)]])
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones((1, first + count), np.int64),
            "position_ids": np.arange(first, first + count)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        start = time.perf_counter()
        request.infer({name: value for name, value in inputs.items() if name in names}, share_inputs=True)
        return time.perf_counter() - start

    context = _MOST

    def seconds_of(length: int, cached: bool) -> float:
        nonlocal context
        if not cached or context >= _MOST:
            request.reset_state()
            seconds = run(0, length)
            context = length if cached else _MOST
        if cached:
            seconds, context = run(context, 1), context + 1
        return seconds

    answer({"bytes": size, "version": openvino.__version__}, seconds_of)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "write" in given:  # a process of its own, whose memory goes when it ends
        write_model(Path(given["write"]), given)
    else:
        serve(given)
