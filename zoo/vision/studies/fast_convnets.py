"""`zoo reproduce fast-convnets`: the speed of sparse MobileNet-v1, from its committed benchmarks."""

from __future__ import annotations

from zoo.studies.benchmarks import benchmark_study

STUDY = benchmark_study(
    "fast-convnets",
    "MobileNet-v1 with sparse 1x1 convolutions",
    "Erich Elsen, Marat Dukhan, Trevor Gale, Karen Simonyan: Fast Sparse ConvNets, CVPR 2020",
    29,
    ("mobilenet-1", "mobilenet-2"),
    "1.3 to 2.4 times dense, on ARM",
)
