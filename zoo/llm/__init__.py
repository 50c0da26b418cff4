"""Sparse models of the llm domain."""
