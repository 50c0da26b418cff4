"""`zoo reproduce flash-llm`: sizes of Tiled-CSL, exact round trips, and load-as-sparse products on CPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from zoo.errors import ConfigError
from zoo.shared.bench import compare, ratio, threads
from zoo.shared.ops import pack, sparse_linear
from zoo.shared.ops.sparse_linear import plan
from zoo.shared.ops.tiled_csl import TILE_COLUMNS, TILE_ROWS, pack_tiled_csl, tiled_bytes, tiled_linear
from zoo.studies.benchmarks import outcome
from zoo.studies.cells import CellCache
from zoo.studies.study import Arm, Study, shown
from zoo.studies.tables import Table, Verdict
from zoo.studies.view import Row, View

CSR, OURS, TILED, DENSE = "CSR (SciPy)", "sparse_linear", "Tiled-CSL (LSCD)", "dense (torch)"
# Rows: sparsity; entries: over Sputnik, SparTA, cuBLAS on an A100, from the README of the released code.
_PUBLISHED = {0.7: (3.6, 1.4, 1.4), 0.8: (3.0, 1.4, 1.7), 0.9: (2.0, 1.6, 2.1)}


@dataclass(frozen=True)
class FlashOptions:
    """Options.

    Args:
        rows, columns: of the weight, multiples of 128 and 64 here, so that sizes are the format's own.
        sparsities: shares of zeros; above 0.5.
        batches: columns N of the other matrix.
        processors: threads of all products.
        rounds: alternations of the timing.
    """

    rows: int = 8192
    columns: int = 4096
    sparsities: tuple[float, ...] = (0.7, 0.8, 0.9)
    batches: tuple[int, ...] = (1, 8, 32)
    processors: int = 2
    rounds: int = 7

    def __post_init__(self) -> None:
        if self.rows % TILE_ROWS or self.columns % TILE_COLUMNS or min(self.rows, self.columns) < 1:
            raise ConfigError(f"rows are a multiple of {TILE_ROWS}, columns of {TILE_COLUMNS}")
        if not self.sparsities or not all(0.5 < s < 1 for s in self.sparsities) or min(self.batches) < 1:
            raise ConfigError("sparsities lie between 0.5 and 1, batches are at least 1")


def measure(make: None, config: FlashOptions, case: Row, cells: CellCache) -> list[Row]:
    """One row per batch size: bytes of each layout, and how many times faster than dense each product is."""
    sparsity = case["level"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(config.rows, config.columns, generator=generator).half().float()
    weight *= torch.rand(weight.shape, generator=generator) >= sparsity
    kept = int((weight != 0).sum())
    tiled, packed = pack_tiled_csl(weight), pack(weight)
    csr = csr_matrix(weight.numpy().astype(np.float32))
    least, most = tiled_bytes(config.rows, config.columns, kept)
    exact = torch.equal(tiled.to_dense().float(), weight)
    rows = []
    for batch in config.batches:
        x = torch.randn(batch, config.columns, generator=generator)
        columns = np.ascontiguousarray(x.numpy().T)
        expected = x @ weight.T
        functions: dict[str, Callable[[], Any]] = {
            DENSE: lambda x=x: torch.nn.functional.linear(x, weight),  # type: ignore[misc]
            OURS: lambda x=x: sparse_linear(x, packed),  # type: ignore[misc]
            CSR: lambda columns=columns: csr @ columns,  # type: ignore[misc]
            TILED: lambda x=x: tiled_linear(x, tiled),  # type: ignore[misc]
        }
        errors = {
            OURS: _error(functions[OURS](), expected),
            CSR: _error(torch.from_numpy(functions[CSR]().T), expected),
            TILED: _error(functions[TILED](), expected),
        }
        with threads(config.processors), torch.inference_mode():
            times = compare(functions, rounds=config.rounds, block_seconds=0.15)
        rows.append(
            {
                "batch": batch,
                "kept": kept,
                "backend": plan(x, packed).backend,
                "layout": packed.layout,
                "exact": exact,
                "bytes": {
                    "tiled": tiled.nbytes,
                    "least": least,
                    "most": most,
                    "dense_fp16": 2 * weight.numel(),
                    "csr_fp16_32": kept * 6 + 4 * (config.rows + 1),
                    "sparse_linear_fp16": pack(weight.half()).nbytes,
                },
                "milliseconds": {name: 1000 * timing.median for name, timing in times.items()},
                "over_dense": {name: ratio(times[DENSE], timing).value for name, timing in times.items()},
                "faster": {
                    f"{ours} over {other}": dataclasses.asdict(ratio(times[other], times[ours]))
                    for ours in (OURS, TILED)
                    for other in (CSR, DENSE)
                },
                "errors": errors,
            }
        )
    return rows


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def sizes(view: View) -> Table:
    """Bytes of each layout over dense."""
    config, body = view.options, []
    for sparsity in view.levels():
        found = view.part(level=sparsity).rows[0]["bytes"]
        names = ("tiled", "csr_fp16_32", "sparse_linear_fp16")
        body.append([shown(sparsity), *(f"{found[name] / found['dense_fp16']:.3f}" for name in names)])
    return Table(
        f"Bytes of a {config.rows} x {config.columns} fp16 weight over dense",
        ["zeros", "Tiled-CSL", "CSR, 32-bit columns", "sparse_linear"],
        body,
        "Tiled-CSL: 4 bytes per kept weight and padding; break-even at 50 % zeros.",
    )


def times(view: View) -> Table:
    """Speed of each product over dense."""
    config, body = view.options, []
    for row in view.rows:
        where = [shown(row["level"]), row["batch"], f"{row['milliseconds'][DENSE]:.2f}"]
        speeds = (f"{row['over_dense'][name]:.2f}x" for name in (OURS, CSR, TILED))
        body.append([*where, f"{row['layout']}, {row['backend']}", *speeds])
    return Table(
        f"Products with a {config.rows} x {config.columns} weight in fp32, {config.processors} threads",
        ["zeros", "batch", "dense [ms]", "layout, backend", OURS, CSR, TILED],
        body,
        "Times faster than dense; below 1 is slower.",
    )


def facts(view: View) -> list[Verdict]:
    """Counts that are exact, and the ratios of speed of each level."""
    sizes = [row["bytes"] for row in view.rows]
    padding = [size["tiled"] - size["least"] for size in sizes]
    worst = max(max(row["errors"].values()) for row in view.rows)
    bits = "Tiled-CSL gives back every weight bit for bit"
    formula = "packed bytes are those of the formula, padding at most three words per tile"
    equal = "all products equal the dense one (relative error below 1e-4)"
    padded = f"{min(padding):,} to {max(padding):,} bytes of padding"
    within = all(size["least"] <= size["tiled"] <= size["most"] for size in sizes)
    exact = all(row["exact"] for row in view.rows)
    found = [
        view.fact(bits, "lossless", f"{len(view.levels())} weights", exact),
        view.fact(formula, "4 bytes per non-zero", padded, within),
        view.fact(equal, "fp16 tolerance", f"{worst:.1e}", worst < 1e-4),
    ]
    for sparsity in view.levels():
        rows, published = view.part(level=sparsity).rows, _PUBLISHED.get(sparsity)
        said = f"{published[0]}x over Sputnik, {published[1]}x over SparTA" if published else "not stated"
        dense = f"{published[2]}x over cuBLAS" if published else "not stated"
        for name, product, other, text in (
            ("sparse_linear, which computes sparse, is faster than CSR", OURS, CSR, said),
            ("sparse_linear, which computes sparse, is faster than dense", OURS, DENSE, dense),
            ("load-as-sparse, compute-as-dense (Tiled-CSL) is faster than dense", TILED, DENSE, dense),
            ("load-as-sparse, compute-as-dense (Tiled-CSL) is faster than CSR", TILED, CSR, said),
        ):
            factors = {row["batch"]: row["faster"][f"{product} over {other}"] for row in rows}
            claim = f"{shown(sparsity)} zeros: {name} at every batch"
            measured = ", ".join(
                f"{f['value']:.2f}x [{f['low']:.2f}, {f['high']:.2f}] at {batch}"
                for batch, f in factors.items()
            )
            slowest = [min(f[end] for f in factors.values()) for end in ("low", "high")]
            found.append(
                Verdict(claim, f"{text} (A100)", measured, outcome(*slowest), paper=view.study.papers)
            )
    return found


STUDY = Study(
    "flash-llm",
    "Flash-LLM: load as sparse, compute as dense",
    "Haojun Xia et al.: Flash-LLM: Enabling Cost-Effective and Highly-Efficient Large Generative Model "
    "Inference with Unstructured Sparsity, VLDB 2024",
    FlashOptions,
    {"products": Arm()},
    lambda options: [{"arm": "products", "level": s, "seed": 0} for s in options.sparsities],
    measure,
    papers=(44,),
    varies=("sparsities",),
    facts=facts,
    tables=[sizes, times],
    notes=lambda options: [
        "Published factors are those of the released kernel on an A100 (fp16, tensor cores), over Sputnik, "
        "SparTA and cuBLAS. No GPU was used here; times are fp32 on the CPU named below, medians of "
        "alternating runs, in brackets the range over them, by which a claim is judged.",
        "Tiled-CSL (LSCD) is the paper's product with its own format on a CPU: each tile is spread out in "
        "the first-level cache and multiplied there with its zeros. Packed models run sparse_linear. A "
        "kernel for a GPU would have to scatter into shared memory, which Triton cannot say.",
    ],
)
