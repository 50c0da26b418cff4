"""From a checkpoint of another library to sparse weights that anybody loads: one model through every border.

    python benchmarks/end_to_end.py --steps 30 --json benchmarks/results/end_to_end.json

transformers and tokenizers alone make a GPT-NeoX (Pythia's architecture), teach it on a text for a minute
or so, and write the folder that a hub would have: nobody publishes one this small, and the zoo has no part
in it.
Then, each step a command or a process of its own:

1. `zoo sparsify FOLDER --method wanda`, calibrated on that text;
2. LoRA by peft on the sparse folder, zeros held (`hold_masks`), merged, saved by `save_pretrained`;
3. lm-eval (its own command line, its Hugging Face model) on each of the three, perplexity of the text's end;
4. `zoo export --to onnx`, compared in onnxruntime;
5. a clean process without the zoo loads the folder with transformers, counts zeros and writes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NEEDED = ("peft", "lm_eval", "datasets", "onnx", "onnxscript", "onnxruntime")
LENGTH = 64
TASK = """
task: end_of_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
metadata: {{version: 1.0}}
"""
CLEAN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
inner = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
zeros, total = sum(int((p == 0).sum()) for p in inner), sum(p.numel() for p in inner)
ids = tokenizer("First Citizen:", return_tensors="pt").input_ids
written = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
assert "zoo" not in sys.modules
made = {"class": type(model).__name__, "zeros": zeros / total, "text": tokenizer.decode(written[0])}
print(json.dumps(made))
"""


def missing() -> list[str]:
    """The packages that are not installed."""
    import importlib.util

    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def checkpoint(folder: Path, text: str, steps: int, width: int, layers: int) -> None:
    """A GPT-NeoX of transformers with a tokenizer of its own, trained for some steps, as a hub's folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [text],
        trainers.BpeTrainer(vocab_size=1024, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet),
    )
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, bos_token=end, pad_token=end)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
    }
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=1024, num_attention_heads=4, max_position_embeddings=256, **special, **sizes)
    )
    ids = torch.tensor(tokenizer(text)["input_ids"])
    train(model, model.parameters(), ids, steps, 2e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(model: Any, parameters: Any, ids: Any, steps: int, rate: float) -> None:
    """AdamW on random windows of a text."""
    import torch

    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(list(parameters), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2))
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (16,), generator=generator)
        batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def adapted(sparse: Path, out: Path, text: str, steps: int) -> None:
    """The sparse folder after LoRA by peft, merged."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zoo.shared.masks import set_masks
    from zoo.shared.masks.foreign import masks_from_zeros
    from zoo.training.peft_lora import hold_masks

    model = AutoModelForCausalLM.from_pretrained(sparse)
    tokenizer = AutoTokenizer.from_pretrained(sparse)
    set_masks(model, masks_from_zeros(model))
    peft = get_peft_model(model, LoraConfig(r=8, target_modules=["query_key_value", "dense_h_to_4h"]))
    hold_masks(peft)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    train(peft, (p for p in peft.parameters() if p.requires_grad), ids, steps, 5e-3)
    peft.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)


def command(*words: str, offline: bool = True) -> str:
    """Run a command of this interpreter and return what it printed last; its own error where it fails."""
    env = os.environ | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done.stdout


def lm_eval(folder: Path, task: Path, work: Path) -> dict[str, float]:
    """lm-eval's figures of a folder, by its command line."""
    out = work / f"{folder.name}-lm-eval"
    options = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32,max_length=256"]
    options += ["--tasks", "end_of_text", "--include_path", str(task.parent), "--device", "cpu"]
    command("-m", "lm_eval", *options, "--batch_size", "4", "--output_path", str(out))
    found = json.loads(next(out.rglob("results_*.json")).read_text())["results"]["end_of_text"]
    return {name.partition(",")[0]: value for name, value in found.items() if isinstance(value, float)}


def run(work: Path, text: str, steps: int, width: int = 128, layers: int = 4) -> dict[str, Any]:
    """All steps in a folder; what each gave."""
    cut = int(0.97 * len(text))
    corpus, end = text[:cut], text[cut:]
    (work / "corpus.txt").write_text(corpus)
    rows = [{"text": part} for part in end.split("\n\n") if len(part) > 40][:60]
    (work / "task").mkdir()
    (work / "task" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = work / "task" / "end.yaml"
    task.write_text(TASK.format(rows=work / "task" / "rows.jsonl"))
    dense, sparse, tuned = work / "dense", work / "sparse", work / "tuned"
    begun = time.perf_counter()
    checkpoint(dense, corpus, steps, width, layers)
    wanda = ["sparsify", str(dense), "--method", "wanda", "--sparsity", "0.5", "--out", str(sparse)]
    command("-m", "zoo", *wanda, "--text", str(work / "corpus.txt"), "--windows", "16", "--length", "128")
    adapted(sparse, tuned, corpus, max(steps // 2, 1))
    result: dict[str, Any] = {"documents": len(rows), "steps": steps}
    for folder in (dense, sparse, tuned):
        clean = json.loads(command("-I", "-c", CLEAN, str(folder)).strip().splitlines()[-1])
        result[folder.name] = clean | lm_eval(folder, task, work)
    report = command("-m", "zoo", "export", str(sparse), "--to", "onnx", "--out", f"{work}/m.onnx", "--json")
    exported = json.loads(report)
    result["onnx"] = {key: exported[key] for key in ("zeros", "difference", "bytes")}
    return result | {"seconds": round(time.perf_counter() - begun, 1)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of the first training; LoRA takes half")
    parser.add_argument("--text", type=Path, help="by default tinyshakespeare of $ZOO_DATA")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    if absent := missing():
        raise SystemExit(
            f"not installed: {', '.join(absent)}; pip install 'sparse-model-zoo[llm,onnx,lm-eval]' peft"
        )
    text = options.text or Path(os.environ["ZOO_DATA"]) / "text" / "tinyshakespeare.txt"
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), text.read_text(encoding="utf-8"), options.steps)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
