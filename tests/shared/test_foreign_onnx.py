"""Sparse ONNX files: initialisers to weights and masks, by hand-made graphs and torch's own exporter."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from zoo.shared.errors import MaskError
from zoo.shared.masks import Mask, MaskSet, set_masks
from zoo.shared.masks.foreign_onnx import onnx_state
from zoo.shared.masks.patterns import NM

onnx = pytest.importorskip("onnx", reason="onnx is not installed (the extra `onnx`)")

WEIGHT = np.array([[1, 0, 0, 2], [0, 3, 4, 0]], dtype=np.float32)  # [out, in], 2:4


def graph_file(path, nodes, arrays, sparse=()):
    """An ONNX file with these nodes, from x to y."""
    from onnx import TensorProto, helper, numpy_helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    dense = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], dense, sparse_initializer=list(sparse))
    onnx.save(helper.make_model(graph), path)
    return path


def test_the_weight_of_a_product_gets_the_name_of_its_layer_and_its_orientation(tmp_path):
    from onnx import helper

    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_12"], ["h"], name="/body/0/fc/MatMul"),
        helper.make_node("Gemm", ["h", "onnx::Gemm_13"], ["y"], name="/head/Gemm", transB=1),
    ]
    arrays = {"onnx::MatMul_12": WEIGHT.T.copy(), "onnx::Gemm_13": WEIGHT.T.copy(), "val_3": WEIGHT}
    state, masks = onnx_state(graph_file(tmp_path / "m.onnx", nodes, arrays))
    assert set(state) == {"body.0.fc.weight", "head.weight"} == set(masks)
    assert torch.equal(state["body.0.fc.weight"], torch.from_numpy(WEIGHT))
    assert torch.equal(state["head.weight"], torch.from_numpy(WEIGHT.T))
    assert masks["body.0.fc.weight"].pattern == NM(2, 4) and masks["head.weight"].kept == 4


@pytest.mark.parametrize("linear", [True, False])
def test_a_sparse_initializer_is_filled_up_with_zeros(linear, tmp_path):
    from onnx import TensorProto, helper

    places = np.flatnonzero(WEIGHT) if linear else np.argwhere(WEIGHT)
    values = helper.make_tensor("fc.weight", TensorProto.FLOAT, [4], [1, 2, 3, 4])
    index = helper.make_tensor("i", TensorProto.INT64, list(places.shape), places.reshape(-1).tolist())
    sparse = helper.make_sparse_tensor(values, index, [2, 4])
    node = helper.make_node("Gemm", ["x", "fc.weight"], ["y"], name="/fc/Gemm", transB=1)
    state, masks = onnx_state(graph_file(tmp_path / "m.onnx", [node], {}, [sparse]))
    assert torch.equal(state["fc.weight"], torch.from_numpy(WEIGHT)) and masks["fc.weight"].sparsity == 0.5


def test_what_torch_exports_comes_back(tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (the extra `onnx`)")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    keep = {name: Mask(torch.rand(p.shape) < 0.5) for name, p in model.named_parameters() if p.dim() > 1}
    MaskSet(keep).apply_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (torch.randn(2, 3, 4, 4),), dynamo=True, verbose=False)
    program.save(tmp_path / "m.onnx")
    state, masks = onnx_state(tmp_path / "m.onnx")
    again = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    again.load_state_dict(state)
    set_masks(again, masks)
    assert masks.equal(MaskSet(keep))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_files_that_hold_no_pruned_weights_are_refused(tmp_path):
    from onnx import helper

    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="/fc/Gemm")
    dense = graph_file(tmp_path / "dense.onnx", [node], {"w": WEIGHT + 1})
    coded = graph_file(tmp_path / "coded.onnx", [node], {"w": WEIGHT.astype(np.int8)})
    (text := tmp_path / "text.onnx").write_text("no file of ours")
    for path, message in [
        (dense, "no weight has 5% zeros"),
        (coded, "quantised weights"),
        (text, "is no ONNX file"),
        (tmp_path / "none.onnx", "there is no such file"),
    ]:
        with pytest.raises(MaskError, match=message):
            onnx_state(path)
