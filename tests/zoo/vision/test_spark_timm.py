"""timm's ResNets and ConvNeXts as SparK encoders. Skipped where timm is not installed."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

from zoo.errors import ConfigError
from zoo.optional import import_timm
from zoo.vision.spark.encoder import SparKEncoder
from zoo.vision.spark.masking import draw_cells
from zoo.vision.spark.objective import SparK

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed: pip install 'sparse-model-zoo[vision]'", allow_module_level=True)

timm = import_timm()


@pytest.mark.parametrize("name", ["resnet10t", "resnet18", "convnext_atto"])
def test_all_executions_agree_and_the_weights_go_back(name):
    arguments = {"drop_path_rate": 0.2} if "convnext" in name else {}
    encoder = SparKEncoder(timm.create_model(name, num_classes=3, **arguments), 64).double()
    assert encoder.strides == (4, 8, 16, 32)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    cells = draw_cells(2, encoder.grid, 0.5, generator)
    prototype = SparK(encoder, 32).double()
    results = []
    for execution in ("masked", "grid", "pairs"):
        spark = copy.deepcopy(prototype)
        spark.execution = execution
        torch.manual_seed(0)  # of dropped branches
        loss = spark.loss(images, cells)
        loss.backward()
        results.append([loss, *(p.grad for p in spark.parameters() if p.grad is not None)])
    assert len(results[0]) > 50
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-7, atol=1e-9)
    fresh = timm.create_model(name, num_classes=3)
    fresh.load_state_dict(encoder.float().export(), strict=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seresnet18", "SEModule"),
        ("convnextv2_atto", "GlobalResponse"),
        ("resnet50_gn", "GroupNorm"),
        ("tf_mobilenetv3_small_minimal_100", "Conv2dSame"),
    ],
)
def test_networks_that_average_over_hidden_sites_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        SparKEncoder(timm.create_model(name), 64)


def test_sizes_that_the_stride_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match="halve|multiple"):
        SparKEncoder(timm.create_model("resnet10t"), 72)
    with pytest.raises(ConfigError, match="one cell"):
        SparKEncoder(timm.create_model("resnet10t"), 32)
