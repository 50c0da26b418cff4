"""The core of the sparse model zoo: masks, parts of sparse methods, packed formats, sparse operations.

Nothing in this package knows the zoo or any of its domains. Import the modules directly
(`from shared.masks import MaskSet`); this file imports nothing, so that `import shared` costs nothing.
"""
