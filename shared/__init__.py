"""The core of the sparse model zoo: masks, parts of sparse methods, packed formats, sparse operations.

It is imported as `zoo.shared` (`from zoo.shared.masks import MaskSet`): what is installed then owns no
top-level name but `zoo`. In the repository `zoo/shared` is a link to this folder; in a wheel the folder lies
there. Nothing in this package knows the rest of the zoo, so all its imports are relative. This file imports
nothing.
"""

if __name__ != "zoo.shared":
    raise ImportError(
        f"this folder is the core of the sparse model zoo and is imported as 'zoo.shared'. Received: "
        f"{__name__!r}. Write `from zoo.shared... import ...`, or rename your own package if you meant "
        "another 'shared'."
    )
