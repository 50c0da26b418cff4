"""One table over all papers: what each claims, what was published, what came out here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from zoo.errors import DataError
from zoo.registry import STUDIES
from zoo.shared.store.io import read_json
from zoo.studies.tables import Outcome, Table

#: The papers of the zoo by number.
PAPERS = {
    1: "TEDDY: Trimming Edges with Degree-based Discrimination strategY",
    2: "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers",
    3: "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution",
    4: "HollowNeRF: Pruning Hashgrid-Based NeRFs with Trainable Collision Mitigation",
    5: "Efficient Pruning of Text-to-Image Models: Insights from Pruning Stable Diffusion",
    6: "SpaRP: Fast 3D Object Reconstruction and Pose Estimation from Sparse Views",
    7: "DASS: Differentiable Architecture Search for Sparse neural networks",
    8: "Pruning-aware Sparse Regularization for Network Pruning",
    9: "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for "
    "Sparse Training",
    10: "SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on Fine-Grained Group Sparsity",
    11: "QUEEN: QUantized Efficient ENcoding of Dynamic Gaussians for Streaming Free-viewpoint Videos",
    12: "Sparse Iso-FLOP Transformations for Maximizing Training Efficiency",
    13: "Deep Generative Adversarial Network for Occlusion Removal from a Single Image",
    14: "SparCL: Sparse Continual Learning on the Edge",
    15: "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification",
    16: "Exploring Sparsity in Graph Transformers",
    17: "Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization",
    18: "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow",
    19: "Quick and Robust Feature Selection: the Strength of Energy-efficient Sparse Training for "
    "Autoencoders",
    20: "One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression",
    21: "AIM 2024 Sparse Neural Rendering Challenge: Dataset and Benchmark",
    22: "GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference",
    23: "LM-Gaussian: Boost Sparse-view 3D Gaussian Splatting with Large Model Priors",
    24: "SPIn-NeRF: Multiview Segmentation and Perceptual Inpainting with Neural Radiance Fields",
    25: "Effortless Efficiency: Low-Cost Pruning of Diffusion Models",
    26: "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models",
    27: "Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow Co-Design",
    28: "Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging",
    29: "Fast Sparse ConvNets",
    30: "Once for Both: Single Stage of Importance and Sparsity Search for Vision Transformer Compression",
    31: "Model Sparsity Can Simplify Machine Unlearning",
    32: "DPMesh: Exploiting Diffusion Prior for Occluded Human Mesh Recovery",
    33: "Part123: Part-aware 3D Reconstruction from a Single-view Image",
    34: "ShapeFusion: A 3D diffusion model for localized shape editing",
    35: "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information",
    36: "Random Search as a Baseline for Sparse Neural Network Architecture Search",
    37: "Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training",
    38: "SMASH: Sparse Matrix Atomic Scratchpad Hashing",
    39: "EdgeGaussians -- 3D Edge Mapping via Gaussian Splatting",
    40: "Structured Bayesian Compression for Deep Neural Networks Based on The Turbo-VBI Approach",
    41: "In Search of the Successful Interpolation: On the Role of Sharpness in CLIP Generalization",
    42: "Model-Based Control with Sparse Neural Dynamics",
    43: "VisDiff: SDF-Guided Polygon Generation for Visibility Reconstruction and Recognition",
    44: "Flash-LLM: Enabling Cost-Effective and Highly-Efficient Large Generative Model Inference "
    "with Unstructured Sparsity",
    45: "CoherentGS: Sparse Novel View Synthesis with Coherent 3D Gaussians",
    46: "LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models",
    47: "Low Rank Matrix Completion via Robust Alternating Minimization in Nearly Linear Time",
    48: "GVGEN: Text-to-3D Generation with Volumetric Representation",
    49: "Lottery Jackpots Exist in Pre-trained Models",
    50: "GaussianObject: Just Taking Four Images to Get A High-Quality 3D Object with Gaussian Splatting",
    51: "Reprogramming under constraints: Revisiting efficient and reliable transferability of "
    "lottery tickets",
    52: "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
    53: "SparseNeRF: Distilling Depth Ranking for Few-shot Novel View Synthesis",
    54: "Advancing Model Pruning via Bi-level Optimization",
    55: "Unified Low-rank Compression Framework for Click-through Rate Prediction",
    56: "One-2-3-45: Any Single Image to 3D Mesh in 45 Seconds without Per-Shape Optimization",
    57: "LoMOE: Localized Multi-Object Editing via Multi-Diffusion",
    58: "Iterative Token Evaluation and Refinement for Real-World Super-Resolution",
    59: "DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets",
    60: "OReX: Object Reconstruction from Planar Cross-sections Using Neural Fields",
    61: "Continuous-Multiple Image Outpainting in One-Step via Positional Query and A "
    "Diffusion-based Approach",
    62: "Joint Generative Modeling of Scene Graphs and Images via Diffusion Models",
    63: "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling",
    64: "Shepherding Slots to Objects: Towards Stable and Robust Object-Centric Learning",
}
COLUMNS = (
    "paper",
    "claim",
    "published",
    "measured",
    "verdict",
    "smallest visible",
    "command",
    "date",
    "tuned",
)
NOT_YET, TUNED = "not yet", "What was tuned"


def results(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The result files of registered studies below a folder, by name of the study and place.

    Raises:
        DataError: the folder is not there.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of results; run from a checkout, or give --results")
    known, found = set(STUDIES.names()), []
    for path in sorted(folder.rglob("*.json")):
        if path.stem in known:
            content = read_json(path)
            if isinstance(content, dict) and content.get("study") == path.stem:
                found.append((path, content))
    return sorted(found, key=lambda one: (one[0].stem, str(one[0])))


def overview(folder: Path) -> Table:
    """A row for each claim of each result, by paper; the papers without a study at the end.

    Args:
        folder: where the results lie.
    """
    rows: list[tuple[int, list[Any]]] = []
    for _, content in results(folder):
        for verdict in content["result"]["verdicts"]:
            cells = [verdict[name] for name in ("claim", "published", "measured", "verdict", "visible")]
            date = str(content.get("created", ""))[:10]
            date += "" if content.get("provenance") else ", no commit kept"
            for number in verdict["paper"] or [0]:
                name = f"{number}. {PAPERS[number]}" if number else content["paper"]
                rows.append(
                    (
                        number or len(PAPERS) + 1,
                        [name, *cells, content["command"], date, _tuned(content, verdict)],
                    )
                )
    seen = {number for number, _ in rows}
    rows += [
        (len(PAPERS) + 1 + number, [f"{number}. {title}", *[""] * 3, NOT_YET, *[""] * 4])
        for number, title in PAPERS.items()
        if number not in seen
    ]
    body = [row for _, row in sorted(rows, key=lambda one: one[0])]
    counts = {
        verdict: sum(row[4] == verdict for row in body) for verdict in dict.fromkeys(r[4] for r in body)
    }
    note = "; ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
    return Table("What the papers claim and what came out here", list(COLUMNS), body, note)


def _tuned(content: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    """What was chosen for the arms that a claim names, or for any if it names none of them."""
    tables = [table for table in content["result"]["tables"] if table["title"] == TUNED]
    rows = [row for table in tables for row in table["rows"]]
    own = [row for row in rows if row[0] in verdict["claim"]] or rows
    return "; ".join(f"{arm}: {option} on {on}" for arm, option, on, _ in own) or "nothing"


def links(folder: Path, page: Path) -> dict[str, str]:
    """For each paper of the overview, Markdown links from a page to the results of its studies."""
    found: dict[str, dict[str, str]] = {}
    for path, content in results(folder):
        place = os.path.relpath(path.with_suffix(".md"), page.parent).replace(os.sep, "/")
        for number in {number for verdict in content["result"]["verdicts"] for number in verdict["paper"]}:
            found.setdefault(f"{number}. {PAPERS[number]}", {}).setdefault(
                path.stem, f"[{path.stem}]({place})"
            )
    return {paper: ", ".join(own.values()) for paper, own in found.items()}


def in_short(table: Table, pages: Mapping[str, str] | None = None) -> Table:
    """Claims of each paper by verdict, from the table of all claims; papers without a study have none.

    Args:
        table: from `overview`.
        pages: from `links`, for a column of them.
    """
    verdicts = [name for name in get_args(Outcome) if any(row[4] == name for row in table.rows)]
    counted: dict[str, dict[str, int]] = {}
    for row in table.rows:
        found = counted.setdefault(row[0], dict.fromkeys(verdicts, 0))
        if row[4] != NOT_YET:
            found[row[4]] += 1
    rows: list[list[Any]] = [
        [paper, *(found[name] or "" for name in verdicts)] if any(found.values()) else [paper, NOT_YET]
        for paper, found in counted.items()
    ]
    width, columns = len(verdicts) + 1, ["paper", *verdicts]
    rows = [row + [""] * (width - len(row)) for row in rows]
    if pages is not None:
        columns, rows = [*columns, "pages"], [[*row, pages.get(row[0], "")] for row in rows]
    return Table("In short", columns, rows)


def page(short: str, table: str) -> str:
    """The Markdown page around the two tables."""
    return (
        "# Papers\n\n"
        "Made by `zoo reproduce --list --markdown docs/papers.md` from the files in `benchmarks/results`; a "
        "test compares them. A claim holds or does not hold if its difference over seeds is on that side of "
        "the bar after Holm's correction over the claims of its group; else it cannot be told, and the "
        "smallest difference that the study could have seen says why. It is invalid if its control does not "
        "beat chance, or if an arm was tuned on test data. Rows without a visible difference are counts and "
        "ratios. Rows without a commit were measured before results kept theirs. The pages beside the files "
        "have p-values, the grids of what was tuned, and the machine.\n\n" + short + "\n" + table
    )
