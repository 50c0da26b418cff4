"""Experiments with sparse language models: `zoo reproduce chess`, `llm-pruning`, `ecoflap`, `cfsp`, `gqsa`
and `flash-llm`.
"""
