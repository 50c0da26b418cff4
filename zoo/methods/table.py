"""Which method takes what: the conformance suite over all methods and several kinds of models, as a page.

python -m zoo.methods.table > docs/methods.md
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.methods.conformance import check_method, images_job, plain_network
from zoo.optional import import_timm, usable_torchvision
from zoo.registry import METHODS
from zoo.shared.train import Job, Recipe

HEAD = """# Which method takes what

Made by `python -m zoo.methods.table`: the conformance suite (`zoo.methods.conformance.check_method`) over
every registered method and four networks that are not the zoo's own: plain layers in an `nn.Sequential`, a
ResNet and a vision transformer of timm, a Llama of transformers. "yes": the exact sparsity, the same bits for
the same seed, zeros that survive a training step and a save. Otherwise the line with which it refuses.
"""

#: Options under which a method can run on these small networks in a second.
QUICK: dict[str, dict[str, Any]] = {
    "sparse-soup": {"members": 2, "phases": 1},
    "lottery-ticket": {"rounds": 1},
    "mask-sparsity": {"sparse_epochs": 1},
    "wgsef": {"sparse_epochs": 1},
    "pgf": {"pattern": "2:4"},
    "sr-ste": {"pattern": "2:4"},
    "bdwp": {"pattern": "2:4"},
    "ofb": {"sparse_epochs": 1},
}


def timm_resnet() -> nn.Module:
    """timm's ResNet with one narrow block a stage, for 4 classes."""
    import_timm()
    from timm.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    block: Any = BasicBlock
    made: nn.Module = ResNet(block, (1, 1, 1, 1), num_classes=4, channels=(8, 8, 16, 16), stem_width=8)
    return made


def timm_vit() -> nn.Module:
    """timm's vision transformer of two blocks for images of 16 pixels and 4 classes."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    made: nn.Module = VisionTransformer(16, 4, num_classes=4, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2)
    return made


def llama() -> nn.Module:
    """transformers' Llama of two layers over 32 tokens."""
    usable_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: Any = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 32,
    }
    made: nn.Module = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, **sizes))
    return made.eval()


def tokens_job(method: object) -> Job:
    """Two epochs of two batches of eight sequences of random tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(32, (8, 16), generator=generator) for _ in range(2)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        out: Any = model(input_ids=batch, labels=batch)
        return out.loss

    return Job(batches, loss=loss, recipe=Recipe(epochs=2, lr=0.01, batch=8))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[object], Job]]] = {
    "`nn.Sequential`": (lambda: plain_network(0), images_job),
    "timm ResNet": (timm_resnet, lambda method: images_job(method, 32)),
    "timm ViT": (timm_vit, lambda method: images_job(method, 16)),
    "Llama": (llama, tokens_job),
}


def answer(
    name: str, make: Callable[[], nn.Module], job: Callable[[object], Job], options: dict[str, Any]
) -> str:
    """ "yes", or the method's refusal.

    Args:
        name: of the method.
        make: makes the model, always the same one.
        job: makes the job of a method, always the same one.
        options: further options of the method.
    """
    kind = METHODS.get(name)
    asked = 0.5 if "sparsity" in {field.name for field in dataclasses.fields(kind)} else None
    try:
        outcome = check_method(name, model=make, job=lambda: job(kind), sparsity=asked, **options)
    except Exception as error:  # the page shows a method that breaks the contract, or raises anything
        return f"BREAKS THE CONTRACT: {type(error).__name__}: {error}"
    return "yes" if outcome.taken else outcome.refusal


def table(
    corner: str,
    rows: Sequence[str],
    columns: Sequence[str],
    said: Callable[[str, str], str],
    refusals: list[str],
) -> str:
    """A Markdown table of "yes" and numbers of refusals, which are added to `refusals`."""
    lines = [f"| {corner} | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for row in rows:
        cells = []
        for column in columns:
            cell = said(row, column)
            if cell != "yes":
                if cell not in refusals:
                    refusals.append(cell)
                cell = f"no ({refusals.index(cell) + 1})"
            cells.append(cell)
        lines.append(f"| {row} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def notes(refusals: Sequence[str]) -> str:
    """The refusals that the numbers of tables mean."""
    lines = [f"{number}. {' '.join(text.split())}" for number, text in enumerate(refusals, 1)]
    return "\n## Refusals\n\n" + "\n".join(lines) + "\n"


def page(names: list[str]) -> str:
    """The page: a table of yes and numbers of refusals, and the refusals."""
    refusals: list[str] = []

    def said(name: str, network: str) -> str:
        return answer(name, *NETWORKS[network], QUICK.get(name, {}))

    return f"{HEAD}\n{table('method', names, list(NETWORKS), said, refusals)}{notes(refusals)}"


if __name__ == "__main__":
    logging.getLogger("zoo").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(page(sys.argv[1:] or METHODS.names()), end="")
