"""Libraries that import torchvision, beside a torch without CUDA."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from zoo.errors import ConfigError

_DECLARED: list[torch.library.Library] = []  # a library's operators go when it does


def usable_torchvision() -> None:
    """See that `import torchvision` succeeds, if it is installed, also where its own operators cannot be
    loaded.

    torchvision's usual wheel keeps its operators in a library that needs CUDA's; timm and transformers import
    it for pictures all the same. The two operators that it asks for while it is imported are declared here
    instead; a call of them fails.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)


def import_timm() -> ModuleType:
    """The module timm, also beside a torch without CUDA (see `usable_torchvision`).

    Raises:
        ConfigError: timm is not installed.
    """
    usable_torchvision()
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed. Run: pip install 'sparse-model-zoo[vision]'"
        ) from error
