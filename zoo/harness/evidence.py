"""Evidence: the values per seed behind the figures on cards, committed as JSON beside the code.

    {"per_seed": {"graph/teddy-gcn-cora-g30-w80": {"graph/cora": {"accuracy": {"0": 0.812, "1": 0.805}}}}}

`zoo make` records them here; `zoo verify` compares cards with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from zoo.shared.store.io import read_json, write_json


def record_evidence(
    path: str | Path, model: str, task: str, metric: str, per_seed: Mapping[int, float]
) -> None:
    """Put the values of a model into the file, which keeps all else that it holds.

    Args:
        path: the JSON file; made, with its folder, if it is not there.
        model: name on the card.
        task: name of the task.
        metric: name of the metric.
        per_seed: the measured values.
    """
    file = Path(path)
    content = read_json(file) if file.exists() else {}
    values = content.setdefault("per_seed", {}).setdefault(model, {}).setdefault(task, {})
    values[metric] = {str(seed): value for seed, value in per_seed.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)
