"""Other libraries' engines as peers: the dense network in fp32, exported by ONNX. One that is not
installed is left out.

pip install onnx onnxscript onnxruntime openvino
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Peer = Callable[[], np.ndarray]


def rivals(model: nn.Module, x: Tensor, threads: int) -> dict[str, Peer]:
    """onnxruntime and OpenVINO on the same input, each of which must agree with the model."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    engines = {
        name: make
        for name, make in {"onnxruntime": _onnxruntime, "openvino": _openvino}.items()
        if not missing and importlib.util.find_spec(name) is not None
    }
    for name in {"onnxruntime", "openvino"} - engines.keys():
        what = " and ".join(missing) or name
        print(f"{name} is not compared: {what} is not installed", file=sys.stderr)
    if not engines:
        return {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
        peers = {name: make(path, x.numpy(), threads) for name, make in engines.items()}
    expected = model(x).numpy()
    for name, run in peers.items():
        np.testing.assert_allclose(run(), expected, atol=1e-3 * np.abs(expected).max(), err_msg=name)
    return peers


def _onnxruntime(path: Path, x: np.ndarray, threads: int) -> Peer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)[0]


def _openvino(path: Path, x: np.ndarray, threads: int) -> Peer:
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    return lambda: request.infer([x], share_inputs=True)[0]
