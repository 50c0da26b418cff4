"""Fine-tuning by domain, the Python side of `zoo finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.errors import ConfigError
from zoo.registry import FINETUNERS


def finetune(domain: str, **options: Any) -> Path:
    """Fine-tune a sparse model of a domain without losing its zeros.

    Args:
        domain: whose fine-tuner to use, e.g. `graph`.
        options: fields of that fine-tuner's dataclass; `zoo finetune DOMAIN --help` explains them.

    Returns:
        The folder of the new bundle.

    Raises:
        UnknownNameError: the domain has no fine-tuner.
        ConfigError: an unknown or a missing option.
    """
    tuner = FINETUNERS.get(domain)
    try:
        configured = tuner(**options)
    except TypeError as error:
        raise ConfigError(f"finetune({domain!r}): {error}. See `zoo finetune {domain} --help`.") from error
    path: Path = configured.run()
    return path
