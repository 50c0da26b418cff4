"""What a bundle says of where it was made."""

from __future__ import annotations


def environment() -> dict[str, str]:
    """What a model is made with here: versions, the processor and, in a checkout, the commit."""
    from zoo.harness.records import Environment
    from zoo.studies.digests import commit

    here = Environment.here()
    found = {name: getattr(here, name) for name in ("zoo", "torch", "python", "cpu")}
    return found | ({"commit": commit()} if commit() else {})
