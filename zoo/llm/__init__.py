"""Sparse language models: any transformers causal LM with a gated FFN, trained here or elsewhere.

Importing this package imports neither torch nor transformers: everything is registered by address.
"""

from __future__ import annotations

import importlib
from typing import Any

from zoo.registry import (
    ARCHITECTURES,
    BASE_READERS,
    CONTENTS,
    EXPORTERS,
    FINETUNERS,
    FOLDERS,
    GENERATORS,
    JOBS,
    MAKERS,
    MEASURED,
    METHODS,
    RECIPE_CHECKS,
    STUDIES,
    TASKS,
)

ARCHITECTURES.register("llm/llama", "zoo.llm.models:llama")
ARCHITECTURES.register("llm/transformers", "zoo.llm.models:from_config")
METHODS.register("chess", "zoo.llm.methods.chess:Chess")
METHODS.register("cats", "zoo.llm.methods.cats:Cats")
METHODS.register("teal", "zoo.llm.methods.teal:Teal")
METHODS.register("wanda", "zoo.llm.methods.wanda:Wanda")
METHODS.register("sparsegpt", "zoo.llm.methods.sparsegpt:SparseGPT")
METHODS.register("ecoflap", "zoo.llm.methods.ecoflap:ECoFLaP")
METHODS.register("cfsp", "zoo.llm.methods.cfsp:CFSP")
METHODS.register("gqsa", "zoo.llm.methods.gqsa:GQSA")
TASKS.register("llm/wikitext2", "zoo.llm.tasks:WikiText2")
TASKS.register("llm/tinystories", "zoo.llm.tasks:TinyStories")
TASKS.register("llm/embedded", "zoo.llm.tasks:Embedded")
TASKS.register("llm/cloze-wikitext2", "zoo.llm.tasks:ClozeWikiText2")
TASKS.register("llm/cloze-tinystories", "zoo.llm.tasks:ClozeTinyStories")
TASKS.register("llm/cloze-embedded", "zoo.llm.tasks:ClozeEmbedded")
TASKS.register("lm_eval", "zoo.llm.lm_eval:LmEvalTask")
STUDIES.register("chess", "zoo.llm.studies.chess:STUDY")
STUDIES.register("llm-pruning", "zoo.llm.studies.pruning:STUDY")
STUDIES.register("ecoflap", "zoo.llm.studies.ecoflap:STUDY")
STUDIES.register("nm-training", "zoo.llm.studies.nm_training:STUDY")
STUDIES.register("cfsp", "zoo.llm.studies.cfsp:STUDY")
STUDIES.register("gqsa", "zoo.llm.studies.gqsa:STUDY")
STUDIES.register("flash-llm", "zoo.llm.studies.flash_llm:STUDY")
MAKERS.register("llm/dense", "zoo.llm.makers:dense")
FINETUNERS.register("llm", "zoo.llm.finetune:Finetune")
RECIPE_CHECKS.register("transformers", "zoo.llm.recipe_check:Transformers")
JOBS.register("llm", "zoo.llm.domain:make_job")
FOLDERS.register("llm/config.json", "zoo.llm.folders:sparsify_folder")
BASE_READERS.register("llm", "zoo.llm.folders:base_contents")
MEASURED.register("llm", "zoo.llm.domain:measured")
CONTENTS.register("llm", "zoo.llm.domain:content")
TASKS.register("llm/text", "zoo.llm.tasks:TextFile")
EXPORTERS.register("gguf", "zoo.llm.gguf:ExportGguf")
GENERATORS.register("llm", "zoo.llm.generate:generate")
TASKS.register("llm/sparsity-embedded", "zoo.llm.sparsity_task:EmbeddedSparsity")
TASKS.register("llm/sparsity-tinystories", "zoo.llm.sparsity_task:TinyStoriesSparsity")

_PUBLIC = {
    "find_blocks": "models.blocks",
    "load_pretrained": "models",
    "read_llama2c": "models.llama2c",
    "tokenizer_of": "data.tokenization",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"zoo.llm.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
