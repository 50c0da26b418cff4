"""`zoo generate`: text from a language model."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from zoo.cli import OK
from zoo.cli.console import note, print_json
from zoo.cli.parsing import Positional, metavar, parse
from zoo.errors import ConfigError
from zoo.report.plain import plain


@dataclass
class Generate:
    """Let a language model write: text as it comes, then tokens per second."""

    model: Annotated[str, Positional, metavar("MODEL")]
    """A name, folder or hf://owner/name."""

    prompt: str = ""
    """The beginning of the text."""

    max_new_tokens: int = 128
    """At most so many tokens."""

    temperature: float = 0.0
    """Of sampling; 0 takes the most probable token each time."""

    seed: int = 0
    """Of sampling."""

    execution: Literal["masked", "packed"] = "masked"
    """Plain dense products, or modules that skip the zeros."""

    threads: int | None = None
    """Processor threads; by default torch's choice."""

    json: bool = False
    """Print one JSON object at the end instead of streaming."""


def generate_command(argv: Sequence[str]) -> int:
    """`zoo generate MODEL --prompt TEXT ...`."""
    options = parse(Generate, argv, "generate")
    for name, given in (("--max-new-tokens", options.max_new_tokens), ("--threads", options.threads)):
        if given is not None and given < 1:
            raise ConfigError(f"{name} must be at least 1, received {given}")
    if not 0 <= options.temperature < math.inf:
        raise ConfigError(f"--temperature must be finite and not negative, received {options.temperature}")
    from zoo.bundles.catalog import find

    bundle = find(options.model)
    from zoo.registry import GENERATORS

    if bundle.card.domain not in GENERATORS.names():
        raise ConfigError(
            f"{bundle.card.name} is of the {bundle.card.domain} domain; only language models write. See "
            "`zoo list --domain llm`."
        )
    import torch

    from zoo.bundles.store import load_bundle

    generate = GENERATORS.get(bundle.card.domain)

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_bundle(bundle, options.execution)
    pending = [options.prompt]  # shown when the model has taken it

    def show(text: str) -> None:
        _show(pending.pop() + text if pending else text)

    done = generate(
        model,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        on_text=None if options.json else show,
    )
    if options.json:
        print_json({"model": bundle.card.reference, "prompt": options.prompt, **done.to_dict()})
        return OK
    print("".join(pending))
    speed = done.decode_tokens_per_second
    note(
        f"{bundle.card.reference}, {options.execution}, {torch.get_num_threads()} threads: "
        f"{done.prompt_tokens} prompt tokens in {done.prefill_seconds * 1000:.0f} ms, {done.new_tokens} new"
        + ("" if speed is None else f", then {speed:.1f} tokens/s")
    )
    return OK


def _show(text: str) -> None:
    sys.stdout.write(plain(text))
    sys.stdout.flush()
