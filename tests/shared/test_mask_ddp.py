"""Two processes under Accelerate's DistributedDataParallel (gloo): zeros hold, masks agree after regrowth."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

WORKER = """
import sys
import torch
from accelerate import Accelerator
from torch import nn
from zoo.shared.masks import Mask, MaskSet, masks_of
from zoo.shared.pruning.regrow import SET, RigL
from zoo.shared.pruning.sparsifier import Sparsifier

accelerator = Accelerator(cpu=True)
rank, out = accelerator.process_index, sys.argv[1]
assert accelerator.num_processes == 2
result = {}

for views in (False, True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    model, optimizer = accelerator.prepare(model, optimizer)
    masks = MaskSet({"0.weight": Mask(torch.rand(16, 6, generator=torch.Generator().manual_seed(1)) < 0.4)})
    dropped = ~masks["0.weight"].keep
    if views:
        core = accelerator.unwrap_model(model)
        model = nn.parallel.DistributedDataParallel(core, gradient_as_bucket_view=True)
    weight = accelerator.unwrap_model(model)[0].weight
    with masks.attach(model, optimizer):
        for step in range(4):
            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank))
            accelerator.backward(model(batch).square().mean())
            assert (weight.grad[dropped] == 0).all(), "clipping must see masked gradients"
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            assert masks.lost_zeros(model) == []
            optimizer.zero_grad()
    assert masks_of(model) is not None
    result[f"weight-{views}"] = weight.detach().clone()

for name, regrow in {"rigl": RigL(end=20), "set": SET(end=20)}.items():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    with Sparsifier(model, optimizer, sparsity=0.6, regrow=regrow, every=2) as sparsifier:
        first = sparsifier.masks
        for step in range(6):
            # Different data on each rank: local gradients alone would give different masks.
            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank))
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()
        assert sparsifier.masks.lost_zeros(model) == []
        assert not sparsifier.masks.equal(first)
        for key, mask in sparsifier.masks.items():
            result[f"{name}-{key}"] = mask.keep

torch.save(result, f"{out}/rank{rank}.pt")
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def test_zeros_and_masks_agree_between_two_processes(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(__file__).resolve().parents[2])
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={
                **os.environ,
                "PYTHONPATH": root,
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "ACCELERATE_USE_CPU": "true",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = [worker.communicate(timeout=400)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(output)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == 6 and set(first) == set(second)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
