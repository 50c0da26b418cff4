"""Training: rates and windows, exact resuming, zeros in full and low-rank fine-tuning, merges, generation."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path

import pytest
import torch

from zoo.bundles.catalog import find
from zoo.bundles.store import load
from zoo.cli import main
from zoo.errors import ConfigError, DataError
from zoo.llm.finetune import Finetune
from zoo.llm.generate import generate
from zoo.llm.lora import attach_lora, detach_lora
from zoo.llm.models import llama
from zoo.llm.models.blocks import find_blocks
from zoo.llm.train import Windows, llm_recipe, window_loss
from zoo.shared.errors import IdentityError, MaskError, TrainingError
from zoo.shared.masks import masks_of
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.train import Checkpoint, Fit, Job, resume

DENSE = "llm/dense-shakespeare"


def tiny(seed: int = 0, sparsity: float | None = None):
    torch.manual_seed(seed)
    model = llama(64, 32, 48, layers=2, heads=4, kv_heads=2, context=32)
    if sparsity is not None:
        sparsify(model, sparsity=sparsity, names=["model.layers.*_proj.weight"])
    return model


def text(length: int = 2000):
    """Tokens that can be learnt: each follows from the one before."""
    return (torch.arange(length) * 7) % 61


def test_rates_rise_and_fall_to_zero():
    recipe = llm_recipe(100, lr=1.0)
    rates = [recipe.learning_rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.01
    assert rates[52] == pytest.approx(0.5, abs=0.02)


def passes(windows: Windows, seed: int) -> torch.Tensor:
    return torch.cat([*windows.draw(torch.Generator().manual_seed(seed))])


def test_a_pass_sees_each_window_once_and_passes_differ():
    windows = Windows(torch.arange(1000), window=10, batch=7)
    first = passes(windows, 3)
    assert len(set(first[:, 0].tolist())) == len(first) == 7 * len(windows) == windows.per_pass // 7 * 7
    assert torch.equal(first[:, 1:] - first[:, :1], torch.arange(1, 11).expand(len(first), 10))
    assert torch.equal(passes(windows, 3), first) and not torch.equal(passes(windows, 4), first)
    assert {int(passes(windows, seed)[0, 0]) % 10 for seed in range(20)} != {0}  # the cuts move
    few = windows.sized(200)
    assert len(few) == 1 and len(passes(few, 0)) == few.per_pass  # the only batch may be short
    with pytest.raises(DataError, match="fewer than two windows of 10"):
        Windows(torch.arange(20), window=10, batch=1)


def fit_of(model, steps: int, lr: float = 1e-2, accelerator=None) -> Fit:
    job = Job(Windows(text(), 16, 4), window_loss, recipe=llm_recipe(steps, 4, lr))
    return job.fit(model, accelerator=accelerator)


def test_training_learns_and_resumes_to_the_same_bits(tmp_path):
    whole = fit_of(tiny(), 40)
    whole.run(until_step=1)
    start = whole.last_loss
    whole.run()
    assert whole.last_loss < start - 1
    file = Checkpoint(tmp_path / "run", {"a": 1})
    resume(fit_of(tiny(), 40), file, until_step=17)
    resumed = resume(fit_of(tiny(1), 40), file)
    assert resumed.step == 40
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(IdentityError, match="other options"):
        Checkpoint(tmp_path / "run", {"a": 2}).read()


class Rank:
    """What the loop asks of Accelerate, as one of several processes that exchange nothing."""

    def __init__(self, rank: int, processes: int) -> None:
        self.process_index, self.num_processes = rank, processes

    def prepare(self, *things):
        return things

    def backward(self, loss):
        loss.backward()


def test_shares_of_a_batch_add_up_to_it():
    gradients = []
    for rank, processes in ((0, 1), (0, 2), (1, 2)):
        job = Job(Windows(text(), 16, 4), window_loss, recipe=llm_recipe(1, 4))
        fit = job.fit(tiny(), accelerator=Rank(rank, processes), clip=0.0)
        fit.run()
        gradients.append(fit.model.lm_head.weight.grad)
    torch.testing.assert_close(gradients[0], (gradients[1] + gradients[2]) / 2)
    with pytest.raises(TrainingError, match="multiple of the 3 processes"):
        fit_of(tiny(), 1, accelerator=Rank(0, 3)).run()


def test_a_loss_that_is_not_finite_stops_the_training():
    model = tiny()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss became nan at step 0"):
        fit_of(model, 1).run()


def adapted(model, steps: int = 12):
    """Train low-rank updates of a model; returns it before they are taken off."""
    attach_lora(model, rank=4, seed=1)
    fit = fit_of(model, steps, lr=2e-2)
    before = fit.model(input_ids=text(32)[None]).logits
    fit.run()
    return before


def test_low_rank_updates_keep_every_zero_and_merge_to_the_same_model():
    model = tiny(sparsity=0.6)
    masks, start = masks_of(model), copy.deepcopy(model)
    ids = text(32)[None]
    before = adapted(model)
    with torch.no_grad():
        assert torch.equal(before, start(input_ids=ids).logits)  # B is zero: nothing changes at first
        trained = model(input_ids=ids).logits
        assert not torch.allclose(trained, start(input_ids=ids).logits, atol=0.1)
        detach_lora(model, merge=True)
        torch.testing.assert_close(model(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-5)
    assert masks.lost_zeros(model) == []
    assert model.state_dict().keys() == start.state_dict().keys()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert changed == set(masks)
    kept = sum(int((p != 0).sum()) for n, p in model.named_parameters() if n in masks)
    assert kept == sum(mask.kept for mask in masks.values())


def test_adapters_merge_only_onto_the_zeros_they_were_trained_on():
    model = tiny(sparsity=0.6)
    start = copy.deepcopy(model)
    adapted(model, steps=3)
    adapter = detach_lora(model, merge=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start.get_parameter(name))
    other, dense = tiny(sparsity=0.5), tiny()
    for wrong in (other, dense):
        unchanged = copy.deepcopy(wrong).state_dict()
        with pytest.raises(MaskError, match="other zeros"):
            adapter.merge_(wrong)
        assert all(torch.equal(value, unchanged[name]) for name, value in wrong.state_dict().items())
    with pytest.raises(MaskError, match="no weight"):
        adapter.merge_(llama(64, 16, 32, layers=1, heads=4, context=32))
    adapter.merge_(start)
    assert masks_of(start).lost_zeros(start) == []
    half = copy.deepcopy(model).half()
    adapter.merge_(half)
    assert masks_of(half).lost_zeros(half) == []


def test_low_rank_options_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="rank must be between 1 and 16"):
        attach_lora(tiny(), rank=17)
    with pytest.raises(ConfigError, match="No projection matches"):
        attach_lora(tiny(), rank=2, names=["*.c_proj.weight"])
    with pytest.raises(ConfigError, match="no low-rank updates"):
        detach_lora(tiny(), merge=True)
    model = tiny()
    names = attach_lora(model, rank=2, names=["*.down_proj.weight"])
    assert names == [f"{block.mlp_name}.down_proj.weight" for block in find_blocks(model)]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(n.endswith((".a", ".b")) and "down_proj" in n for n in trained)
    assert not any(p.dim() < 2 for p in fit_of(model, 1).parameters if p.requires_grad)


TOY = Path(__file__).with_name("toy_task.py")


@pytest.fixture
def pruned(tmp_path, monkeypatch):
    """A pruned toy bundle beside its dense twin, and the toy task in this process."""
    from zoo.bundles.publish import About
    from zoo.harness.tasks import get_task
    from zoo.llm.bundling import save_dense
    from zoo.methods.prune import Prune
    from zoo.registry import TASKS

    TASKS.names()
    monkeypatch.setattr(TASKS, "_entries", dict(TASKS._entries))
    from zoo.llm import data

    monkeypatch.setattr(data, "_READERS", dict(data._READERS))
    data._known.cache_clear()
    runpy.run_path(str(TOY))
    from zoo.harness.making import Origin, make_bundle

    torch.manual_seed(0)
    shape = {"layers": 2, "heads": 4, "kv_heads": 2, "context": 64, "tokenizer": "shakespeare"}
    model = llama(1024, 32, 48, **shape).eval().half()
    about = About("llm/toy-dense", "s", "c", "x", {"name": "toy", "source": "toy", "licence": "toy"})
    dense = save_dense(model, tmp_path / "models" / "llm" / "toy-dense", about, ["llm/toy"])
    monkeypatch.setenv("ZOO_PATH", str(tmp_path / "models"))
    method = Prune(sparsity=0.5, names=("model.layers.*_proj.weight",))
    origin = Origin("llm/toy-half", "prune", "c")
    path = make_bundle(find(dense), method, origin, tmp_path / "models" / "llm" / "toy-half")
    assert get_task("llm/toy").evaluate(load(path)).n == 2
    yield path
    data._known.cache_clear()


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4, "lr": 5e-3, "distillation": 0.5}])
def test_fine_tuning_recovers_and_keeps_every_zero(tmp_path, pruned, options, capsys):
    settings = {"steps": 12, "batch": 4, "window": 32, "lr": 3e-3, **options}
    path = Finetune(str(pruned), tmp_path / "tuned", **settings).run()
    before, after = load(pruned), load(path)
    assert masks_of(before).equal(masks_of(after)) and masks_of(before).lost_zeros(after) == []
    assert after.dtype == torch.float16
    old, new = find(pruned).card, find(path).card
    assert new.metrics[0].value < old.metrics[0].value and new.metrics[0].dense == old.metrics[0].dense
    assert new.sparsity == old.sparsity and new.dense_twin == "llm/toy-dense"
    assert new.method.hyperparameters["finetuned"]["steps"] == 12
    assert "pruned weights that are zero" in capsys.readouterr().err
    assert not (tmp_path / ".tuned.checkpoint").exists()


def test_impossible_fine_tunings_are_refused(tmp_path, pruned):
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    for options, error, message in (
        ({"checkpoint_every": 0}, ConfigError, "checkpoint_every"),
        ({"lora_rank": -1}, ConfigError, "lora_rank"),
        ({"lora_rank": 64}, ConfigError, "rank must be between"),
        ({"distillation": float("inf")}, ConfigError, "distillation"),
        ({"text": str(tmp_path / "short.txt")}, DataError, "fewer than two windows"),
        ({"text": str(tmp_path / "latin.txt")}, DataError, "UTF-8"),
        ({"text": str(tmp_path / "absent.txt")}, DataError, "absent.txt"),
    ):
        with pytest.raises(error, match=message):
            Finetune(str(pruned), tmp_path / "tuned", steps=2, **options).run()
        assert not (tmp_path / "tuned").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        Finetune(str(pruned), tmp_path / "there").run()
    with pytest.raises(ConfigError, match="no model of the llm domain"):
        Finetune("graph/dense-gcn-digits", tmp_path / "tuned").run()


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, pruned, stopped):
    def tune(name):
        return Finetune(str(pruned), tmp_path / name, steps=10, batch=2, window=32, checkpoint_every=4).run()

    with stopped():
        tune("stopped")
    assert (tmp_path / ".stopped.checkpoint" / "state.safetensors").exists()
    assert not (tmp_path / "stopped").exists()
    paths = [tune(name) for name in ("stopped", "whole")]
    left, right = (load(path).state_dict() for path in paths)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert find(paths[0]).card.metrics == find(paths[1]).card.metrics


@pytest.fixture(scope="module")
def dense():
    return load(DENSE)


def test_streamed_text_is_what_transformers_generates(dense):
    pieces: list[str] = []
    prompt = "KATHARINA:\nI pray you, sir"
    done = generate(dense, prompt, max_new_tokens=24, on_text=pieces.append)
    assert dense.dtype == torch.float16 and "".join(pieces) == done.text and done.new_tokens == 24
    from zoo.llm.data.tokenization import tokenizer_of

    tokenizer = tokenizer_of(dense)
    ids = torch.tensor([[0, *tokenizer(prompt).input_ids]])
    single = copy.deepcopy(dense).float()
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    out = single.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == done.text
    assert done.prompt_tokens == ids.shape[1] and done.decode_tokens_per_second > 0


def test_sampling_follows_its_seed_and_leaves_torchs_alone(dense):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    texts = [generate(dense, "KATE:\n", max_new_tokens=16, temperature=1.0, seed=s).text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.rand(1), expected)


def test_impossible_prompts_are_refused(dense):
    with pytest.raises(ConfigError, match="Shorten the prompt"):
        generate(dense, "word " * 400)
    for options in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(ConfigError, match="max_new_tokens must be"):
            generate(dense, "x", **options)


def test_texts_stand_side_by_side(tmp_path, dense):
    from zoo.llm.samples import Samples

    models, prompts = (DENSE, "llm/chess-30-shakespeare"), ("KATE:\nI", "A | B")
    found = Samples(models, prompts, 6, tmp_path / "texts.json").run()
    stored = json.loads((tmp_path / "texts.json").read_text())
    assert stored == found and len(found["texts"]) == 2
    own = found["texts"][find(DENSE).card.reference]
    assert own[prompts[0]] == generate(dense, prompts[0], max_new_tokens=6).text
    table = (tmp_path / "texts.md").read_text().splitlines()
    assert len(table) == 4 and table[2].startswith("| **KATE:<br>I**") and table[3].count("A \\| B") == 2
    with pytest.raises(ConfigError, match="at least one model"):
        Samples((), prompts)


@pytest.mark.parametrize("name", [DENSE, "llm/chess-30-shakespeare"])
def test_packed_models_write_the_same_text(name, capsys):
    texts = []
    for execution in ("masked", "packed"):
        arguments = ["--prompt", "KATE:\n", "--max-new-tokens", "12", "--execution", execution, "--json"]
        assert main(["generate", name, *arguments]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != ""


def test_the_command_line_writes(capsys):
    assert main(["generate", DENSE, "--prompt", "KATE:\n", "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("KATE:\n") and "tokens/s" in shown.err
    assert main(["generate", DENSE, "--prompt", "KATE:\n", "--max-new-tokens", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "KATE:\n" + found["text"] == shown.out.rstrip("\n") and found["new_tokens"] == 8
    assert main(["generate", "graph/dense-gcn-digits"]) == 2
    assert "only language models write" in capsys.readouterr().err
    assert main(["generate", DENSE, "--prompt", "word " * 3000]) == 2
    seen = capsys.readouterr()
    assert not seen.out and "Shorten the prompt" in seen.err
