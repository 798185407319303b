"""Tokenizers of LLaMA's kinds."""

import pytest
from support import small_tokenizers


@pytest.fixture
def sentencepiece(pieces):
    """Makes a LLaMA tokenizer: legacy, new, or without a space before a text."""

    def make(kind, *others):
        return small_tokenizers.llama(pieces(kind != "without"), kind, *others)

    return make
