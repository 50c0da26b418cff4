"""Small random language models for the tests of the language domain."""

from __future__ import annotations

import pytest
import torch


def build_llama(layers: int = 2, hidden: int = 32, ffn: int = 64, vocab: int = 96, seed: int = 0):
    """A random LLaMA in eval mode: grouped-query attention, untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def token_batches(count: int = 4, size: int = 2, length: int = 24, vocab: int = 96, seed: int = 1):
    """Batches of random token ids, [size, length]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (size, length), generator=generator) for _ in range(count)]


@pytest.fixture
def make_llama():
    """The function that makes a random LLaMA of given size."""
    return build_llama


@pytest.fixture
def llama():
    """A random LLaMA of two layers."""
    return build_llama()


@pytest.fixture
def batches():
    """Four batches of random token ids."""
    return token_batches()


@pytest.fixture(scope="module")
def make_llama_once():
    """A random LLaMA and batches, for fixtures that many tests of a module share."""
    return build_llama(), token_batches()
