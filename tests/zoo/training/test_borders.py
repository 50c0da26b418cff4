"""Borders of training: peft's LoRA, transformers' Trainer, each on a model with masks."""

from __future__ import annotations

import copy

import pytest
import torch

import zoo
from zoo.errors import ConfigError
from zoo.llm.families import family, token_ids
from zoo.shared.masks import masks_of

# peft asks transformers by its former name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def sparse(kind="llama"):
    model = family(kind)
    zoo.sparsify(model, sparsity=0.6)
    return model


def adapted(kind="llama", targets=("q_proj", "down_proj"), **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = sparse(kind)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets), **options))


def trained(model, steps=3):
    """Train what may be trained, by AdamW with decay."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1
    )
    for ids in token_ids(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids(1, seed=9)[0]).logits


@pytest.mark.parametrize(
    ("kind", "targets", "options"),
    [
        ("llama", ("q_proj", "down_proj"), {"lora_dropout": 0.1}),
        ("gpt2", ("c_attn", "c_proj"), {"fan_in_fan_out": True}),
        ("opt", ("q_proj", "fc1"), {"lora_bias": True}),
    ],
)
def test_merged_lora_computes_what_was_trained_and_keeps_the_zeros(kind, targets, options):
    from zoo.training.peft_lora import hold_masks

    model = adapted(kind, targets, **options)
    base = copy.deepcopy(sparse(kind).state_dict())
    names = hold_masks(model)
    assert len(names) == (6 if kind == "gpt2" else 4)
    before = logits(trained(model, 3))
    masks = masks_of(model.get_base_model())
    merged = model.merge_and_unload()
    assert masks_of(merged) is masks and masks.lost_zeros(merged) == []
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    assert all(not torch.equal(merged.get_parameter(name), base[name]) for name in names)


def test_lora_that_nobody_holds_fills_the_zeros():
    model = trained(adapted())
    merged = model.merge_and_unload()
    assert len(masks_of(merged).lost_zeros(merged)) == 4


def test_a_saved_adapter_is_held_again_where_it_is_loaded(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from zoo.training.peft_lora import hold_masks

    model = adapted()
    hold_masks(model)
    expected = logits(trained(model))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(sparse(), tmp_path).eval()
    assert not torch.allclose(logits(again), expected, atol=1e-4)
    hold_masks(again)
    torch.testing.assert_close(logits(again), expected)
    again.merge_adapter()
    again.unmerge_adapter()
    torch.testing.assert_close(logits(copy.deepcopy(again)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "with a variant such as DoRA: only plain LoRA"),
        ({"targets": ("lm_head",)}, "none of the weights that LoRA adapts is masked"),
    ],
)
def test_adapters_that_would_fill_zeros_are_refused(change, message):
    from zoo.training.peft_lora import hold_masks

    with pytest.raises(ConfigError, match=message):
        hold_masks(adapted(**change))


def test_masks_are_asked_for():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from zoo.training.peft_lora import hold_masks

    model = peft.get_peft_model(family("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="LlamaForCausalLM carries no masks"):
        hold_masks(model)


def trainer(model, folder, callbacks, **options):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in torch.cat(token_ids(3))]
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def test_the_callback_keeps_zeros_in_a_trainer_that_loads_its_best_model(tmp_path):
    from zoo.training.callback import KeepZeros

    model = sparse()
    masks, before = masks_of(model), copy.deepcopy(model.state_dict())
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer(model, tmp_path, [KeepZeros()], **best).train()
    assert masks_of(model) is masks and masks.lost_zeros(model) == []
    assert not torch.equal(model.state_dict()["model.norm.weight"], before["model.norm.weight"])
    with masks.attach(model):  # nothing is attached any more
        pass


def test_without_the_callback_a_trainer_loses_them(tmp_path):
    model = sparse()
    trainer(model, tmp_path, [], save_strategy="no").train()
    assert masks_of(model).lost_zeros(model)


def test_the_callback_asks_for_masks(tmp_path):
    from zoo.training.callback import KeepZeros

    with pytest.raises(ConfigError, match=r"carries no masks; pass KeepZeros\(masks\)"):
        trainer(family("llama"), tmp_path, [KeepZeros()], save_strategy="no").train()
