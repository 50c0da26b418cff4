"""A small vision-language model, trained here on captions of digits, for ECoFLaP's two towers.

The image tower is a CLIP vision transformer, the text tower a LLaMA decoder, joined as in LLaVA, all of
transformers' own classes with random initial weights. An image shows two 8x8 digits of scikit-learn's set
side by side; its caption names both, says which is larger and gives their sum.
"""

from __future__ import annotations

import copy
import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from zoo.llm.methods.ecoflap import tensor_counts, zeroth_order_scores
from zoo.llm.methods.wanda import wanda_pruner
from zoo.llm.pruning import kept_of, prune_blocks
from zoo.shared.masks import Mask
from zoo.shared.masks.patterns import Unstructured
from zoo.shared.masks.topk import rowwise_mask
from zoo.studies.view import Row

_NUMBERS = tuple(str(number) for number in range(19))
_WORDS = ("<image>", "<begin>", "left", "right", "equal", "sum", *_NUMBERS)
_ID = {word: index for index, word in enumerate(_WORDS)}
_IMAGE_TOKENS = 16  # patches of 4x4 pixels on an image of 16x16
_STEPS, _BATCH = 250, 32
_TRAIN = 1400  # of 1,797 digits; images of the others are for testing
#: What ECoFLaP is compared with, and what the paper says of it.
CONTROLS = {
    "Wanda, uniform": "VQA 73.6 against 71.9 at 50 % on BLIP",
    "magnitude, uniform": "not stated",
}
DESCRIPTION = (
    "LLaVA of a CLIP tower (2 layers, width 48) and a LLaMA decoder (3 layers, width 64), trained for "
    f"{_STEPS} steps; images of two digits with captions of their names, which is larger, and their sum."
)


def new_model(seed: int) -> LlavaForConditionalGeneration:
    """The model before training."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_channels=1,
    )
    text = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_ID["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=_IMAGE_TOKENS,
    )
    return LlavaForConditionalGeneration(config)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32) / 8 - 1
    return images[order], torch.tensor(found.target)[order]


def pairs(count: int, seed: int, train: bool = True) -> dict[str, Tensor]:
    """Images of two digits with their captions, as the model's keyword arguments."""
    images, targets = _digits()
    low, high = (0, _TRAIN) if train else (_TRAIN, len(targets))
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randint(low, high, (2, count), generator=generator)
    pixels = torch.full((count, 1, 16, 16), -1.0)
    pixels[:, 0, 4:12, :8], pixels[:, 0, 4:12, 8:] = images[left], images[right]
    a, b = targets[left], targets[right]
    larger = torch.where(a > b, _ID["left"], torch.where(a < b, _ID["right"], _ID["equal"]))
    zero = _ID["0"]
    caption = torch.stack([a + zero, b + zero, larger, torch.full_like(a, _ID["sum"]), a + b + zero], 1)
    begin = torch.full((count, 1), _ID["<begin>"])
    ids = torch.cat([torch.full((count, _IMAGE_TOKENS), _ID["<image>"]), begin, caption], 1)
    labels = ids.clone()
    labels[:, : _IMAGE_TOKENS + 1] = -100
    labels[:, -2] = -100  # the word `sum` says nothing
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def train(seed: int) -> LlavaForConditionalGeneration:
    """The trained model."""
    model = new_model(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=_STEPS, pct_start=0.1)
    for step in range(_STEPS):
        batch = pairs(_BATCH, seed * 100_003 + step + 1)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration) -> float:
    """Share of the caption's words that are right on images of test digits, given the true words before."""
    batch = pairs(500, seed=0, train=False)
    predicted = model(**batch).logits[:, :-1].argmax(-1)
    labels = batch["labels"][:, 1:]
    return float((predicted == labels)[labels != -100].float().mean())


def _prune(model: LlavaForConditionalGeneration, arm: str, sparsity: float, seed: int) -> None:
    batches = [pairs(32, 7_000_003 + seed * 1009 + i) for i in range(8)]
    if arm.startswith("ECoFLaP"):
        probes = [pairs(16, 9_000_011 + seed * 1009 + i) for i in range(32)]
        scores = zeroth_order_scores(model, probes, seed=seed)
        counts = tensor_counts(model, scores, sparsity)
        prune_blocks(model, batches, wanda_pruner(Unstructured(), sparsity, counts.__getitem__))
    elif arm.startswith("Wanda"):
        prune_blocks(model, batches, wanda_pruner(Unstructured(), sparsity))
    else:
        prune_blocks(
            model,
            batches,
            lambda block: {
                f"{name}.weight": Mask(rowwise_mask(linear.weight.abs(), kept_of(linear.weight, sparsity)))
                for name, linear in block.linears().items()
            },
        )


def measure(seed: int, sparsities: tuple[float, ...]) -> list[Row]:
    """The accuracy of the dense model of a seed, and of every arm at every sparsity."""
    dense = train(seed)
    made: list[Row] = [{"arm": "dense", "level": 0.0, "accuracy": accuracy(dense)}]
    for sparsity in sparsities:
        for arm in ("ECoFLaP, zeroth order", *CONTROLS):
            model = copy.deepcopy(dense)
            _prune(model, arm, sparsity, seed)
            made.append({"arm": arm, "level": sparsity, "accuracy": accuracy(model)})
    return made
