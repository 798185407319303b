"""The small tokenizers and encoders of other tests, and runs as training leaves them."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
for folder in ("families", "model"):
    sys.path.append(str(TESTS / folder))

import pytest  # noqa: E402
import runs  # noqa: E402


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """Gives a SentencePiece file, with a space before a text or without."""
    import small_tokenizers

    folder = tmp_path_factory.mktemp("pieces")
    files = {
        prefixed: small_tokenizers.train_pieces(folder / f"{prefixed}.model", prefixed)
        for prefixed in (True, False)
    }
    return files.__getitem__


@pytest.fixture(scope="session")
def run(pieces, tmp_path_factory):
    """Makes a finished run: `run("vicuna", train_llm="lora")`."""

    def make(name: str, **how) -> runs.Run:
        return runs.make(tmp_path_factory.mktemp(name), pieces, name, **how)

    return make
