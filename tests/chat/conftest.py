"""Runs as training leaves them."""

import pytest
from support import runs


@pytest.fixture(scope="session")
def run(pieces, tmp_path_factory):
    """Makes a finished run: `run("vicuna", train_llm="lora")`."""

    def make(name: str, **how) -> runs.Run:
        return runs.make(tmp_path_factory.mktemp(name), pieces, name, **how)

    return make
