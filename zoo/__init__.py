"""The sparse model zoo: sparse models found by name, loaded, fine-tuned, evaluated beside their dense twins.

    import zoo

    zoo.list_models("graph/*cora*")
    model = zoo.load("graph/teddy-gcn-cora-g30-w80")
    zoo.info(model).card

`import zoo` imports no library; each function below is imported with what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.bundles.catalog import card, list_models
    from zoo.bundles.hub import pull, push
    from zoo.bundles.store import info, load, save
    from zoo.harness.compare import compare
    from zoo.harness.runner import evaluate
    from zoo.harness.tasks import register_task
    from zoo.harness.verify import verify
    from zoo.methods.front import sparsify
    from zoo.registry import register_architecture, register_method, register_study
    from zoo.shared.train import Job, Recipe
    from zoo.studies.runner import reproduce
    from zoo.training.finetune import finetune

__all__ = [
    "Job",
    "Recipe",
    "card",
    "compare",
    "evaluate",
    "finetune",
    "info",
    "list_models",
    "load",
    "pull",
    "push",
    "register_architecture",
    "register_method",
    "register_study",
    "register_task",
    "reproduce",
    "save",
    "sparsify",
    "verify",
]

_HOMES = {
    "Job": "zoo.shared.train",
    "Recipe": "zoo.shared.train",
    "card": "zoo.bundles.catalog",
    "compare": "zoo.harness.compare",
    "evaluate": "zoo.harness.runner",
    "finetune": "zoo.training.finetune",
    "info": "zoo.bundles.store",
    "list_models": "zoo.bundles.catalog",
    "load": "zoo.bundles.store",
    "pull": "zoo.bundles.hub",
    "push": "zoo.bundles.hub",
    "register_architecture": "zoo.registry",
    "register_method": "zoo.registry",
    "register_study": "zoo.registry",
    "register_task": "zoo.harness.tasks",
    "reproduce": "zoo.studies.runner",
    "save": "zoo.bundles.store",
    "sparsify": "zoo.methods.front",
    "verify": "zoo.harness.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
