"""Exports that other versions of transformers made, opened by the one that is installed."""

import pytest
import torch
from safetensors.torch import load_file
from support.newer import skip_unless_known
from support.record_exports import RECORDED, exported_on, opened, with_weights

from dpa_xtuner.errors import DPAError
from dpa_xtuner.export import export_config
from dpa_xtuner.versions import LLAVA_HOLDS_AN_LLM

FOLDERS = sorted(RECORDED.glob("*/*"))


def test_each_version_made_one_of_each_family_that_it_has():
    made = {version.name: {f.name for f in version.iterdir()} for version in RECORDED.iterdir()}
    assert {v: len(each) for v, each in made.items()} == {"4.48.0": 13, "4.57.6": 15, "5.24.0": 16}
    assert made == {version: exported_on(version) for version in made}


@pytest.mark.parametrize(
    "folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}"
)
def test_it_says_the_same_on_this_version(folder, tmp_path):
    skip_unless_known(folder.name)
    if folder.name == "gemma2" and not LLAVA_HOLDS_AN_LLM:
        pytest.skip("LLaVA does not cap logits since transformers 4.52; the export is refused")
    recorded = load_file(folder / "said.safetensors")
    found = opened(with_weights(folder, tmp_path / "opened"), recorded["pixels"])
    assert found["ids"].tolist() == recorded["ids"].tolist()
    # Pillow scales on 4.48 and 4.57, torchvision on 5.
    torch.testing.assert_close(found["pixels"], recorded["pixels"], atol=0.03, rtol=0)
    assert recorded["logits"].std() > 0.3
    torch.testing.assert_close(found["logits"], recorded["logits"], atol=1e-5, rtol=0)


@pytest.mark.skipif(LLAVA_HOLDS_AN_LLM, reason="on transformers 4.48 it is the same model")
@pytest.mark.parametrize(
    ("fmt", "reason"), [("hf", "caps its logits"), ("xtuner", "the LLM (scales|caps) its")]
)
def test_gemma2_is_refused_where_it_would_be_another_model(run, fmt, reason):
    made = run("gemma2")
    with pytest.raises(DPAError, match=rf"(?s){reason}.*--format parts can"):
        export_config(made.config, fmt=fmt, work_dir=made.work_dir)
