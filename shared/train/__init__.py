"""Training: what to train on and for what (`job`), how (`recipe`), and the one loop (`fit`)."""

from .batches import Batches, Drawn, as_batches
from .checkpoint import Checkpoint, resume
from .cost import Cost, clock, step_macs
from .device import device_named
from .fit import Fit
from .job import Job
from .losses import Distillation, Loss, cross_entropy, output_kl
from .recipe import Recipe

__all__ = [
    "Batches",
    "Checkpoint",
    "Cost",
    "Distillation",
    "Drawn",
    "Fit",
    "Job",
    "Loss",
    "Recipe",
    "as_batches",
    "clock",
    "cross_entropy",
    "device_named",
    "output_kl",
    "resume",
    "step_macs",
]
