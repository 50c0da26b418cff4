"""Sparse language models: any transformers causal LM with a gated FFN, trained here or elsewhere.

Importing this package imports neither torch nor transformers: everything is registered by address.
"""

from __future__ import annotations

import importlib
from typing import Any

from zoo.registry import ARCHITECTURES

ARCHITECTURES.register("llm/llama", "zoo.llm.models:llama")
ARCHITECTURES.register("llm/transformers", "zoo.llm.models:from_config")

_PUBLIC = {
    "find_blocks": "blocks",
    "float32": "models",
    "load_pretrained": "models",
    "read_llama2c": "llama2c",
    "tokenizer_of": "tokenization",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"zoo.llm.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
