"""`make demo`: the main job on embedded data, as the commands a user would type, without any download.

Lists the zoo, loads a pretrained ticket by name, evaluates it beside its dense twin, fine-tunes it for a
moment, counts its zeros before and after, prints the bytes on disk, writes the report page and draws what a
pruned diffusion model makes below what its dense twin makes of the same noise.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

TICKET = "graph/teddy-gcn-digits-g30-w80"
TWIN = "graph/dense-gcn-digits"
RUNS = Path("runs/demo")
REPORT = Path("reports/demo.html")
PAINTER = "diffusion/ecodiff-t2i-digits-k60"
DIGITS = Path("reports/digits.png")
NEXT = {
    f"zoo verify {TICKET}": "measure every figure on a card again",
    "zoo sparsify --method teddy --help": "prune a dense model yourself",
    "zoo finetune graph --help": "fine-tune a ticket, on its own graph or another",
    "zoo reproduce teddy --help": "the paper's experiment, claimed beside measured",
}


class StepFailed(Exception):
    """A command of the demo ended with another exit code than 0."""


def type_command(text: str) -> None:
    """Show a command as the user would type it and run it in this process."""
    from zoo.cli import main as zoo_main

    print(f"\n$ zoo {text}", flush=True)
    code = zoo_main(shlex.split(text))
    if code:
        raise StepFailed(f"`zoo {text}` ended with exit code {code}")


def count_zeros(before: str, after: Path) -> None:
    """Print, mask by mask, that what the first model had pruned is zero in the second.

    Raises:
        StepFailed: a zero was lost.
    """
    import zoo
    from zoo.shared.masks import masks_of

    masks = masks_of(zoo.load(before))
    weights = dict(zoo.load(str(after)).named_parameters())
    if masks is None:
        raise StepFailed(f"{before} carries no masks; reinstall the package")
    print("\nZeros before and after fine-tuning:")
    for name, mask in masks.items():
        lost = int((weights[name][~mask.keep] != 0).sum())
        print(f"  {name:<28} {mask.numel - mask.kept:>8,} zeros, {lost} lost")
        if lost:
            raise StepFailed(f"{name} lost {lost} zeros")


def bytes_on_disk(names: list[str]) -> None:
    """Print the sizes of the files that the names load, and of their weights as dense tensors."""
    from zoo.bundles.catalog import find

    print("\nBytes on disk:")
    for name in names:
        bundle = find(name)
        size, dense = bundle.weights.stat().st_size, bundle.card.cost.bytes.dense
        print(f"  {name:<36} {size:>9,} bytes in the file, {dense:>9,} as dense tensors")


def main() -> int:
    """Run the demo; the exit code is 0 if every step did what it says."""
    start = time.perf_counter()
    tuned = RUNS / "teddy-gcn-digits-tuned"
    try:
        type_command("list")
        type_command(f"show {TICKET}")
        type_command(f"compare {TWIN} {TICKET}")
        options = f"--dataset digits --epochs 30 --out {tuned} --overwrite"
        type_command(f"finetune graph --model {TICKET} {options}")
        count_zeros(TICKET, tuned)
        bytes_on_disk([TWIN, TICKET])
        type_command(f"eval 'graph/*-digits*' --report {REPORT}")
        type_command(f"show {PAINTER} --picture {DIGITS}")
    except StepFailed as failure:
        print(f"demo: {failure}", file=sys.stderr)
        return 1
    print(f"\nDone in {time.perf_counter() - start:.0f} s. The report page: {REPORT.resolve().as_uri()}")
    print(f"Digits that {PAINTER} makes, below its dense twin's: {DIGITS.resolve().as_uri()}")
    print("\nNext (`. .venv/bin/activate` puts the command zoo on the path):")
    for command, purpose in NEXT.items():
        print(f"  {command:<45} {purpose}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
