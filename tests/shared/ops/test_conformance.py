"""Every registered op keeps the promises of `check_op`; one that breaks a promise does not pass."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native, dispatch
from zoo.shared.ops.conformance import check_op

for path in Path(ops.__path__[0]).glob("[a-z]*.py"):  # whatever of them registers an op
    importlib.import_module(f"{ops.__name__}.{path.stem}")


@pytest.mark.parametrize("name", dispatch.registered())
def test_an_op_is_the_same_on_every_backend(name: str) -> None:
    assert check_op(name) >= 10


@pytest.mark.skipif(not _native.available(), reason="no native library")
def test_contended_cores_change_no_bit() -> None:
    """More threads than cores, while others keep these busy: each row still belongs to one thread."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    before = torch.get_num_threads()
    try:
        with dispatch.backend("native"):
            for name in ("sparse_linear", "spmm", "subm_conv", "gather_linear"):
                example = max(dispatch.examples(name), key=lambda each: each.inputs[0].numel())
                torch.set_num_threads(1)
                alone = example.run()
                torch.set_num_threads(2 * len(busy) + 1)
                assert torch.equal(example.run(), alone), name
    finally:
        torch.set_num_threads(before)
        for process in busy:
            process.kill()
            process.wait()


def test_the_suite_knows_every_op() -> None:
    with pytest.raises(OpError, match="op 'nothing' registers no examples"):
        dispatch.examples("nothing")


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (lambda x: torch.nn.functional.linear(x, torch.eye(3)), "inf among the inputs"),
        (lambda x: x.clone().detach(), "gradients"),
        (lambda x: x * 1, "the tangent was lost"),
        (lambda x: x * 2, "plain inputs"),
        (
            lambda x: x + x.view(-1).storage_offset() if x.is_contiguous() else x + 1,
            "every second|transposed",
        ),
    ],
)
def test_a_broken_op_does_not_pass(broken: object, promise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(x: Tensor) -> Tensor:
        if dispatch.requested() == "reference":
            return x.clone()
        assert callable(broken)
        result: Tensor = broken(x)
        return result

    for registry in (dispatch._planners, dispatch._examples):
        monkeypatch.setitem(registry, "broken", None)
    monkeypatch.setitem(dispatch._examples, "broken", lambda: [dispatch.Example(call, (torch.randn(2, 3),))])
    with pytest.raises(AssertionError, match=promise):
        check_op("broken")
