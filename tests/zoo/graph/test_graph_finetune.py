"""Fine-tuning graph models: zeros, resuming after a kill, other graphs, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from zoo.bundles.catalog import find
from zoo.bundles.store import load
from zoo.errors import ConfigError, MissingDataError
from zoo.graph.data import load_graph
from zoo.graph.domain import content
from zoo.graph.finetune import Finetune
from zoo.graph.models import GAT, GCN, GIN
from zoo.graph.tasks import Digits
from zoo.graph.transfer import transferred
from zoo.shared.errors import FormatError, IdentityError, SparseError, StorageError
from zoo.shared.masks import masks_of
from zoo.shared.store.identity import data_digest
from zoo.training import finetune as training

TICKET = "graph/teddy-gcn-digits-g60-w95"


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder).state_dict()


def test_zeros_stay_and_the_bundle_is_whole(tmp_path, capsys):
    path = Finetune(TICKET, tmp_path / "tuned", epochs=4).run()
    before, after = load(TICKET), load(path)
    assert masks_of(before).equal(masks_of(after))
    assert masks_of(before).lost_zeros(after) == []
    changed = [
        n for n, p in after.named_parameters() if not torch.equal(p, dict(before.named_parameters())[n])
    ]
    assert changed
    card = find(path).card
    assert card.dense_twin == "graph/dense-gcn-digits"
    assert card.sparsity.parts == find(TICKET).card.sparsity.parts
    assert card.method.hyperparameters["finetuned"]["epochs"] == 4
    assert "pruned weights that are zero" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["tuned"]  # the checkpoint is gone


def test_a_dense_model_stays_dense(tmp_path):
    path = Finetune("graph/dense-gcn-digits", tmp_path / "tuned", epochs=2).run()
    assert find(path).card.method.name == "dense"
    assert len(masks_of(load(path)) or {}) == 0


COMMAND = """
import sys
from pathlib import Path
from zoo.graph.finetune import Finetune
Finetune({ticket!r}, Path(sys.argv[1]), epochs=int(sys.argv[2]), checkpoint_every=3).run()
"""


def start(out: Path, epochs: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    code = COMMAND.format(ticket=TICKET)
    command = [sys.executable, "-c", code, str(out), str(epochs)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, capsys):
    """The one real kill -9 of a fine-tuning; other domains stop theirs as ctrl-C does."""
    epochs = 60
    process = start(tmp_path / "killed", epochs)
    checkpoint = tmp_path / ".killed.checkpoint" / "state.safetensors"
    deadline = time.monotonic() + 400
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert checkpoint.exists()
    assert not (tmp_path / "killed").exists()
    for name in ("killed", "whole"):
        Finetune(TICKET, tmp_path / name, epochs=epochs, checkpoint_every=3).run()
        assert f"{epochs}/{epochs}" in capsys.readouterr().err
    whole, killed = state_of(tmp_path / "whole"), state_of(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    for name in whole:
        assert torch.equal(whole[name], killed[name]), name
    cards = [find(tmp_path / name).card for name in ("whole", "killed")]
    assert cards[0].metrics == cards[1].metrics
    assert cards[0].weights.bytes == cards[1].weights.bytes


def test_a_training_whose_result_cannot_be_written_is_not_lost(tmp_path, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(training, "publish", full)
        with pytest.raises(StorageError):
            Finetune(TICKET, tmp_path / "tuned", epochs=3, checkpoint_every=10).run()
    capsys.readouterr()
    card = find(Finetune(TICKET, tmp_path / "tuned", epochs=3, checkpoint_every=10).run()).card
    assert "1/3" not in capsys.readouterr().err
    assert card.data.sha256 == data_digest(content("digits"))  # that of the cells of studies
    assert content("digits")[0].shape == (1797, 64) and content("pusher") is None


def test_missing_data_are_named_before_the_training(tmp_path, monkeypatch, capsys):
    def missing(task: object) -> None:
        raise MissingDataError("not there")

    monkeypatch.setattr(Digits, "measured_on", missing)
    with pytest.raises(MissingDataError):
        Finetune(TICKET, tmp_path / "tuned", epochs=3).run()
    assert "1/3" not in capsys.readouterr().err


@pytest.fixture
def interrupted(tmp_path, stopped) -> Path:
    """A checkpoint of a run of 6 epochs that was stopped after 2."""
    with stopped():
        Finetune(TICKET, tmp_path / "tuned", epochs=6, checkpoint_every=2).run()
    return tmp_path / ".tuned.checkpoint" / "state.safetensors"


def test_a_checkpoint_of_other_options_is_refused(tmp_path, interrupted):
    assert interrupted.exists()
    with pytest.raises(IdentityError, match="other options.*Delete"):
        Finetune(TICKET, tmp_path / "tuned", epochs=6, checkpoint_every=2, lr=0.1).run()


def test_a_damaged_checkpoint_is_refused(tmp_path, interrupted):
    content = bytearray(interrupted.read_bytes())
    content[-20] ^= 1
    interrupted.write_bytes(content)
    with pytest.raises(FormatError, match="cannot be read.*checksum.*Delete"):
        Finetune(TICKET, tmp_path / "tuned", epochs=6, checkpoint_every=2).run()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"distillation": -1.0}, "distillation must be finite"),
        ({"twin": "graph/no-such-twin"}, "No dense twin 'graph/no-such-twin'"),
        ({"dataset": "pubmed"}, "No dense twin to stand beside on pubmed"),
        ({"device": "cuda:99"}, "no device 'cuda:99'"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    with pytest.raises(SparseError, match=message):
        Finetune(TICKET, tmp_path / "tuned", **options).run()
    assert not (tmp_path / "tuned").exists()


def test_distillation_asks_the_dense_twin(tmp_path):
    paths = [
        Finetune(TICKET, tmp_path / str(weight), epochs=3, distillation=weight).run() for weight in (0.0, 5.0)
    ]
    plain, taught = (load(path).conv1.lin.weight for path in paths)
    assert not torch.equal(plain, taught)


def test_an_output_that_is_there_is_kept(tmp_path):
    (tmp_path / "tuned").mkdir()
    with pytest.raises(ConfigError, match="there already"):
        Finetune(TICKET, tmp_path / "tuned").run()


@pytest.mark.parametrize(
    "build", [lambda: GCN(12, 16, 3), lambda: GIN(12, 16, 3), lambda: GAT(12, 4, 3, heads=2)]
)
def test_transfer_to_another_graph_keeps_what_fits(graph, build):
    from zoo.graph.teddy import ticket_mask
    from zoo.graph.ticket import EdgeTicket
    from zoo.graph.train import L0Ball
    from zoo.shared.masks import MaskSet, set_masks

    torch.manual_seed(0)
    model = build()
    masks = MaskSet(L0Ball.for_sparsity(model, 0.75)(model))
    set_masks(model, masks)
    loops = isinstance(model, GAT)
    keep = ticket_mask(graph.edge_index, 60, 0.3, add_self_loops=loops)
    model.ticket = EdgeTicket.draw(graph.edge_index, 60, keep)

    same, changes = transferred(model, graph, seed=1)
    assert changes == []
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))

    digits = load_graph("digits")
    moved, changes = transferred(model, digits, seed=1)
    assert (moved.in_channels, moved.out_channels) == (64, 10)
    assert "64 features and 10 classes, the model 12 and 3" in changes[0]
    assert "another graph" in changes[1]
    found = masks_of(moved)
    assert found.lost_zeros(moved) == []
    old = dict(model.named_parameters())
    for name, parameter in moved.named_parameters():
        if old[name].shape == parameter.shape:
            assert torch.equal(parameter, old[name])
            assert found[name].equal(masks[name])
        else:
            expected = parameter.numel() - -(-parameter.numel() * masks.sparsity() // 1)
            assert abs(found[name].kept - expected) <= 1
    entries = digits.edge_index.shape[1]
    dropped = entries - int(moved.ticket.keep.sum())
    assert abs(dropped / entries - (1 - int(keep.sum()) / len(keep))) < 1e-3
    assert torch.isfinite(moved(digits.x, digits.edge_index)).all()
    again, _ = transferred(model, digits, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(moved.parameters(), again.parameters(), strict=True))
