"""Experiments with weight-sparse language models: `zoo reproduce llm-pruning`, `ecoflap`, `cfsp`, `gqsa` and
`flash-llm`.
"""
