"""How much of other libraries' networks structured pruning reaches, beside Torch-Pruning, as a page.

python -m zoo.vision.reach docs/reach.md                       # all lines
python -m zoo.vision.reach docs/reach.md timm/resnet18         # one line; the page keeps its others
"""

from __future__ import annotations

import copy
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.shared.errors import GroupError
from zoo.shared.store.io import atomic_write
from zoo.shared.structure.groups import trace_groups
from zoo.shared.structure.surgery import cut
from zoo.vision.reach_networks import NAMES, network

HEAD = """# What structured pruning reaches

Made by `python -m zoo.vision.reach docs/reach.md`: untrained networks of other libraries, their channels,
heads and neurons found by `zoo.shared.structure.groups.trace_groups`. Reach is the share of the parameters
that lie in units which can be cut. Half of each family's units (the larger half of an odd number) is then cut
from a copy, which must run; where no norm takes its statistics over the units, its outputs must be those of
the masked network.

Torch-Pruning 1.6 (`MagnitudePruner`) cuts the same network at the same ratio: half of the units of each
group, the classifier left alone; of attention whole heads, whose counts and widths are set afterwards as its
examples do for timm. "does not run": the forward pass of what it made raises; "no answer": none within two
minutes of processor time.

"""
PATIENCE = 120  # seconds of processor time that Torch-Pruning has for one network
COLUMNS = (
    "| network | reach | families | parameters left, half of the units cut | outputs equal the masked "
    "network's | parameters left by Torch-Pruning |\n|---|---|---|---|---|---|\n"
)


def line(name: str) -> str:
    """The page's line of a network."""
    model, images = network(name)
    return f"{_own(name, model, images)} {torch_pruned(model, images)} |"


def _own(name: str, model: nn.Module, images: Tensor) -> str:
    try:
        groups = trace_groups(model, (images,))
    except GroupError as error:
        return f"| {name} | 0 % | | | {_short(error)} |"
    total = _parameters(model)
    keep = {key: torch.arange(one.units) < max(one.units // 2, 1) for key, one in groups.items()}
    exact = {key: units for key, units in keep.items() if groups[key].exact}
    said = "no family is exact"
    try:
        if exact:
            cut(copy.deepcopy(model), groups, exact, check=(images,))
            said = "yes"
        smaller = copy.deepcopy(model)
        cut(smaller, groups, keep, allow_inexact=True, check=(images,))
        left = f"{_parameters(smaller) / total:.2f}"
    except GroupError as error:
        left, said = "", f"no: {_short(error)}"
    return f"| {name} | {groups.reach(model):.0%} | {len(groups)} | {left} | {said} |"


def torch_pruned(model: nn.Module, images: Tensor, ratio: float = 0.5) -> str:
    """What Torch-Pruning leaves of a copy, as a share of the parameters, or what comes in its way.

    Args:
        model: a classifier.
        images: a batch.
        ratio: share of the units of each group that goes.
    """
    try:
        import torch_pruning as tp
    except ImportError:
        return "not installed"
    smaller = copy.deepcopy(model)
    with torch.no_grad():
        classes = _tensor(smaller(images)).shape[-1]
    layers = [one for one in smaller.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    outputs = [one for one in layers if one.weight.shape[0] == classes]
    attention = [one for one in smaller.modules() if isinstance(getattr(one, "qkv", None), nn.Linear)]
    heads = {one.qkv: one.num_heads for one in attention}
    signal.signal(signal.SIGPROF, _give_up)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        pruner = tp.pruner.MagnitudePruner(
            smaller,
            images,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=outputs,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=ratio,
            output_transform=lambda made: _tensor(made).sum(),
        )
        pruner.step()
    except TimeoutError:
        return "no answer"
    except Exception as error:  # whatever its tracing or pruning raises is the answer
        return f"raises {_short(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    for one in attention:
        changed: Any = one
        changed.num_heads = pruner.num_heads[one.qkv]
        changed.attn_dim = changed.qkv.out_features // 3
        changed.head_dim = changed.attn_dim // changed.num_heads
    left = f"{_parameters(smaller) / _parameters(model):.2f}"
    try:
        with torch.no_grad():
            smaller(images)
    except Exception:  # any error of the network's own code
        return f"{left}, does not run"
    return left


def _give_up(*_: object) -> None:
    raise TimeoutError


def _tensor(made: Any) -> Tensor:
    """The logits of an output of any of the libraries."""
    logits: Tensor = getattr(made, "logits", made)
    return logits[0] if isinstance(logits, tuple) else logits


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160].replace("|", "/")


def lines_of(page: str) -> dict[str, str]:
    """The lines of an earlier page by network; one from before Torch-Pruning stood beside it says so."""
    rows = (row for row in page.splitlines() if row.startswith("| ") and "/" in row.split("|")[1])
    return {
        row.split("|")[1].strip(): row if row.count("|") == 7 else f"{row} not compared |" for row in rows
    }


def make(path: Path, names: Sequence[str]) -> None:
    """Write the page with these lines anew and the others as they stand, after each line.

    Raises:
        ConfigError: an unknown network, or a library that is not installed.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(f"{unknown[0]} is no network of this page; it has: {', '.join(NAMES)}")
    for name in names:
        row = line(name)
        print(row, file=sys.stderr, flush=True)
        rows = lines_of(path.read_text() if path.is_file() else "") | {name: row}
        atomic_write(path, page(rows).encode())


def page(rows: dict[str, str]) -> str:
    """The page of these lines, and which networks it lacks."""
    lacks = ", ".join(name for name in NAMES if name not in rows)
    text = HEAD + COLUMNS + "\n".join(rows[name] for name in NAMES if name in rows) + "\n"
    return text + (f"\nNot gone through yet: {lacks}.\n" if lacks else "")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # advice of the libraries about their own networks
    torch.set_num_threads(1)
    make(Path(sys.argv[1]), sys.argv[2:] or NAMES)
