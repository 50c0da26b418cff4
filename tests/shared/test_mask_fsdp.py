"""Two processes under FSDP2 (gloo): sharded masks hold their zeros; masks attached too early are refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = """
import sys
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from zoo.shared.errors import MaskError
from zoo.shared.masks import Mask, MaskSet, masks_of

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
mesh = init_device_mesh("cpu", (2,))
KEEP = torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) < 0.4  # 5 rows: uneven parts
MASKS = MaskSet({"0.weight": Mask(KEEP)})


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def shard(model):
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)


def train(model, optimizer, check=False):
    norms = []
    for step in range(4):
        # Each process its own half of the batch, as the one process has both.
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        part = batch.chunk(2)[rank] if check else batch
        model(part).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def refused(call, message):
    try:
        call()
    except MaskError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


plain = network()
optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.3)
with MASKS.attach(plain, optimizer):
    expected_norms = train(plain, optimizer)

model = network()
optimizer = shard(model)
assert MASKS.lost_zeros(model) == ["0.weight"], "no process may think that its part says it all"
with MASKS.attach(model, optimizer) as handle:
    assert MASKS.lost_zeros(model) == []
    refused(lambda: handle.capture_gradients(True), "before fully_shard, or under DDP")
    refused(lambda: MASKS.attach(model, optimizer), "already attached")
    norms = train(model, optimizer, check=True)
    handle.step()
assert MASKS.lost_zeros(model) == [] and masks_of(model) is MASKS
assert torch.allclose(torch.tensor(norms), torch.tensor(expected_norms), rtol=1e-4), (norms, expected_norms)
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
for name, value in (whole or plain.state_dict()).items():
    torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-5)
moments = optimizer.state[dict(model.named_parameters())["0.weight"]]["exp_avg"].full_tensor()
assert (moments[~KEEP] == 0).all() and (moments[KEEP] != 0).all()

# The model carried its masks before it was sharded: they are still known, and attached after.
model = network()
with MASKS.attach(model):
    pass
optimizer = shard(model)
with masks_of(model).attach(model, optimizer):
    train(model, optimizer)
assert MASKS.lost_zeros(model) == []

# Attached too early nothing would hold them: said at the step and at the end.
early = network()
first = torch.optim.AdamW(early.parameters(), lr=0.05)
handle = MASKS.attach(early, first)
optimizer = shard(early)
refused(first.step, "'0.weight' was sharded since the masks were attached")
refused(handle.step, "after fully_shard, with the optimiser that is made then")
refused(lambda: handle.__exit__(None, None, None), "was sharded")
torch.distributed.destroy_process_group()
"""


def test_sharded_masks_hold_their_zeros_and_early_ones_are_refused(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(__file__).resolve().parents[2])
    address = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": root, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
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
