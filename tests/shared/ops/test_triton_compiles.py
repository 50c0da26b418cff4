"""The Triton kernels compile for a GPU (Hopper), which needs none, and read their weights in wide loads."""

from __future__ import annotations

import importlib
import os
import re

import pytest

pytest.importorskip("triton", reason="torch for CPUs comes without Triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
POINTERS = {
    "x": "*bf16",
    "values": "*bf16",
    "columns": "*i16",
    "bits": "*u8",
    "pointer": "*i32",
    "bias": "*bf16",
    "out": "*bf16",
    "scales": "*fp16",
    "zeros": "*u8",
    "codes": "*i64",
    "gate": "*bf16",
    "partial": "*fp32",
}
GATHER = {"B": 1, "N": 256, "U": 8, "ROWS": 128}
ROWS = {"B": 1, "K": 1024, "BIASED": True, "GATED": True}
CASES = {
    "gather inputs": ("gather", "_input_kernel", {"kind": 0, **GATHER}, {"data": "*bf16"}, 8),
    "gather inputs of int8": ("gather", "_input_kernel", {"kind": 1, **GATHER}, {"data": "*i8"}, 0),
    "gather inputs of int4": ("gather", "_input_kernel", {"kind": 2, **GATHER}, {"data": "*u8"}, 0),
    "gather outputs": ("gather", "_output_kernel", {"kind": 0, **ROWS}, {"data": "*bf16"}, 4),
    "gather outputs of int4": ("gather", "_output_kernel", {"kind": 2, **ROWS}, {"data": "*u8"}, 0),
    "sum of parts": ("gather", "_sum_kernel", {"BIASED": True, "P": 32, "N": 64}, {}, 2),
    "bitmask": ("bitmask", "_kernel", {"PANEL": 4096, "S": 128, "B": 4, "BIASED": True}, {}, 0),
    "bitmask by tensor cores": (
        "bitmask",
        "_wide_kernel",
        {"PANEL": 4096, "R": 32, "S": 16, "B": 16, "BIASED": True},
        {},
        0,
    ),
    "csr": ("csr", "_kernel", {"PANEL": 4096, "P": 512, "B": 1, "BIASED": True}, {}, 4),
    "four-bit groups": ("quant", "_kernel", {"WORDS": 1, "B": 1, "G": 32, "BIASED": True}, {}, 2),
}


@pytest.mark.alone
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_kernels_compile_for_hopper():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for case, (module, name, constants, types, wide) in CASES.items():
        kernel = getattr(importlib.import_module(f"zoo.shared.ops.triton.{module}"), name)
        known, names = POINTERS | types, kernel.arg_names
        signature = {each: "constexpr" if each in constants else known.get(each, "i32") for each in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, each in enumerate(names) if each not in constants}
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
        warps = 4 if name in ("_sum_kernel", "_wide_kernel") else 1
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert built.asm["cubin"], case
        assert len(re.findall(r"ld\.global\S*\.v4", built.asm["ptx"])) >= wide, case
        if name == "_wide_kernel":
            assert re.search(r"mma\.sync|wgmma", built.asm["ptx"]), case
