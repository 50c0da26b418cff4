"""Efficient Pruning of Text-to-Image Models (arXiv 2411.15113): text encoder and denoiser pruned each by its
own share, once, without training.

The paper's finding is the split: 47.5 % of the text encoder and 35 % of the denoiser. It differs here in one
thing: Wanda's norms are per input channel of a convolution, not per unfolded position.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from zoo.diffusion.parts import denoiser_of, require_plain
from zoo.diffusion.prompting import Prompted, check_prompted, seed_of, source_of
from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified
from zoo.shared.errors import BudgetError
from zoo.shared.masks import Mask, MaskSet, tighten
from zoo.shared.masks.patterns import parse_pattern
from zoo.shared.masks.topk import rowwise_mask
from zoo.shared.pruning.budgets import BUDGETS, check_sparsity, kept_count
from zoo.shared.pruning.choose import choose_masks, score_tensors
from zoo.shared.pruning.scores import SCORES, Score, ScoreContext, collect_activations
from zoo.shared.train import Job

#: Layers of a denoiser that stay dense: they are small, and every step goes through them.
ENDS = ("conv_in", "conv_out", "time_embedding", "proj_out", "pos_embed", "x_embedder", "context_embedder")


@dataclasses.dataclass
class PruneParts(Prompted):
    """Prune the text encoder and the denoiser of a pipeline each by its own share, without training."""

    needs_job: ClassVar[bool] = True

    text_sparsity: float = 0.475
    """Share of zeros in the text encoder's linear layers."""

    sparsity: float = 0.35
    """Share of zeros in the denoiser's linear layers and convolutions."""

    score: Literal["magnitude", "wanda", "random"] = "magnitude"
    """Which weights matter; Wanda measures inputs along the whole sampling trajectory."""

    scope: Literal["layer", "row", "global"] = "layer"
    """Where weights compete: within their tensor, their output row, or their whole part."""

    prompts: int = 64
    """Prompts on which Wanda measures, guided, both with and without their text."""

    sampling_steps: int = 10
    """Sampling steps of those measurements."""

    guidance: float = 3.0
    """Scale of guidance in those measurements."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Prune `model` in place.

        Args:
            model: with a text encoder and a denoiser, or a denoiser alone.
            job: gives Wanda its prompts.

        Raises:
            BudgetError: a share outside [0, 1).
            ConfigError: no prunable weights, weights that are not finite, or Wanda without a job.
        """
        for share in (self.text_sparsity, self.sparsity):
            check_sparsity(share)
        check_prompted(model, self)
        require_plain(model)
        shares = {name: self.sparsity for name in denoiser_weights(model)}
        shares |= {name: self.text_sparsity for name in text_weights(model)}
        context = ScoreContext(
            activations=self._norms(model, job) if self.score == "wanda" else {},
            generator=torch.Generator().manual_seed(seed_of(model, job)),
        )
        masks: dict[str, Mask] = {}
        for share in sorted({*shares.values()}):
            for names in _parts([name for name, own in shares.items() if own == share]):
                masks |= self._choose(model, names, share, context)
        made = tighten(model, MaskSet(masks))
        return Sparsified(model.eval(), made, hyperparameters=dataclasses.asdict(self))

    def _choose(
        self, model: nn.Module, names: list[str], share: float, context: ScoreContext
    ) -> dict[str, Mask]:
        weights = {name: model.get_parameter(name) for name in names}
        score: Score = SCORES[self.score]()
        empty = MaskSet({})
        scores = score_tensors(weights, score, context, empty, empty)
        pattern = parse_pattern("unstructured")
        if self.scope == "row":
            chosen = {}
            for name, values in scores.items():
                rows = values.flatten(1).float()
                keep = rowwise_mask(rows, kept_count(values.numel(), share)).view(values.shape)
                chosen[name] = Mask(keep, pattern)
            return chosen
        budget = BUDGETS["global" if self.scope == "global" else "uniform"]()
        return dict(choose_masks(scores, share, dict.fromkeys(scores, pattern), budget))

    def _norms(self, model: Any, job: Job | None) -> dict[str, Tensor]:
        source = source_of(model, job, "the score wanda measures inputs while sampling")
        with torch.no_grad():
            return collect_activations(
                model.eval(),
                source.batches(self.prompts),
                lambda _, batch: source.run(batch, self.sampling_steps, self.guidance),
            )


def denoiser_weights(model: nn.Module) -> list[str]:
    """Names of the denoiser's linear and convolution weights, without those of its first and last layers.

    Raises:
        ConfigError: there are none.
    """
    network = denoiser_of(model)
    prefix = next((f"{path}." for path, module in model.named_modules() if module is network and path), "")
    found = [
        f"{prefix}{path}.weight"
        for path, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and path.partition(".")[0] not in ENDS
    ]
    if not found:
        raise ConfigError(f"{type(network).__name__} has no linear layer or convolution to prune")
    return found


def text_weights(model: nn.Module) -> list[str]:
    """Names of the linear weights of all text encoders; embeddings stay dense."""
    return [
        f"{name}.{path}.weight"
        for name, child in model.named_children()
        if name.startswith("text_encoder")
        for path, module in child.named_modules()
        if isinstance(module, nn.Linear)
    ]


def mixed_sparsity(parts: dict[str, tuple[int, float]]) -> float:
    """Zeros over all parameters of several parts, from (parameters, share of zeros) of each.

    Raises:
        BudgetError: no parameters.
    """
    total = sum(parameters for parameters, _ in parts.values())
    if total < 1:
        raise BudgetError("the parts have no parameters")
    return sum(parameters * share for parameters, share in parts.values()) / total


def _parts(names: list[str]) -> list[list[str]]:
    """The names by the part of the pipeline that they belong to: parts do not compete."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("text" if name.startswith("text_encoder") else "denoiser", []).append(name)
    return list(groups.values())
