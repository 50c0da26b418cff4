"""GQSA as a method of the zoo: `zoo sparsify llm/... --method gqsa`."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from zoo.bundles.card import share_dropped
from zoo.bundles.store import PART_MASK
from zoo.errors import ConfigError
from zoo.llm.data.calibration import Calibrated, extras_of
from zoo.llm.methods.gqsa import Tuning, choose_groups, pack_model, quantise_blocks, tune_model
from zoo.llm.models import architecture_of
from zoo.llm.models.quantised import quantise_head
from zoo.llm.pruning import open_sparsity
from zoo.methods.contract import Sparsified
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.measure.modes import float32
from zoo.shared.train import Job


@dataclasses.dataclass
class GQSA(Calibrated):
    """Drop groups of weights and store the others in four bits, tuned block by block and end to end."""

    sparsity: float = 0.5
    """Share of each row's groups to drop, between 0 and 1."""

    group: int = 16
    """Consecutive inputs per group, a multiple of 16."""

    block_epochs: int = Tuning.block_epochs
    """BQPO: passes over the text per block; 0 leaves it out."""

    model_epochs: int = Tuning.model_epochs
    """E2E-OQP: passes over the text; 0 leaves it out."""

    head: bool = False
    """Store the output layer in four bits, too, all of it; the embedding stays as it is."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Compress `model` in place: its blocks' linear layers become `GroupQuantLinear`.

        Raises:
            ConfigError: options that are not possible, a model that carries masks, or one without blocks or
                tokenizer.
            DataError: too little text, or activations that are not finite.
        """
        open_sparsity(self.sparsity)
        if masks_of(model):
            raise ConfigError("GQSA chooses its own zeros; start from a dense model")
        tuning = Tuning(block_epochs=self.block_epochs, model_epochs=self.model_epochs)
        with float32(model):
            batches = self.tokens(model, job, size=8)
            choose = choose_groups(self.group, self.sparsity)
            quantisers = quantise_blocks(model, batches, choose, group=self.group, tuning=tuning)
            codes = tune_model(model, quantisers, batches, tuning)
            pack_model(model, quantisers, codes)
            if self.head:
                quantise_head(model, self.group)
        set_masks(model, None)
        keep = torch.cat([quantiser.keep.any(-1).flatten() for quantiser in quantisers.values()]).cpu()
        kept, total = int(keep.sum()), keep.numel()
        part = {"kept": kept, "total": total, "sparsity": share_dropped(kept, total)}
        return Sparsified(
            model,
            MaskSet({}),
            extras_of(model) | {f"groups{PART_MASK}": keep},
            dataclasses.asdict(self) | {"bits": 4},
            {"groups": {**part, "pattern": f"block1x{self.group}"}},
            architecture_of(model)["args"],
        )
