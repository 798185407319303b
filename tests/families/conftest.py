"""SentencePiece files, trained once for all tests."""

import pytest
import small_tokenizers


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """Gives a SentencePiece file, with a space before a text or without."""
    folder = tmp_path_factory.mktemp("pieces")
    files = {
        prefixed: small_tokenizers.train_pieces(folder / f"{prefixed}.model", prefixed)
        for prefixed in (True, False)
    }
    return files.__getitem__


@pytest.fixture
def sentencepiece(pieces):
    """Makes a LLaMA tokenizer: legacy, new, or without a space before a text."""

    def make(kind, *others):
        return small_tokenizers.llama(pieces(kind != "without"), kind, *others)

    return make
