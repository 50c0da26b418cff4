"""The core of the sparse model zoo: masks, sparse methods' building blocks, packed formats and sparse operations.

Nothing in this package knows the zoo or any of its domains. Import the modules directly (`from shared.masks import
MaskSet`); this file imports nothing, so that `import shared` costs nothing.
"""
