"""What is read from the folders of a stage."""

import json

import pytest

from dpa_xtuner.errors import DPAError
from dpa_xtuner.stages.artifacts import read_origin


@pytest.mark.parametrize("key", ["component", "part"])  # the second is of older versions
def test_a_folder_says_which_component_it_holds(key, tmp_path):
    (tmp_path / "dpa.json").write_text(json.dumps({key: "projector", "stage": "align"}))
    assert read_origin(tmp_path) == {"component": "projector", "stage": "align"}


def test_a_folder_that_no_stage_wrote_is_answered_with_the_stage_to_run(tmp_path):
    with pytest.raises(DPAError, match=r"align/projector was not written .*DPA_STAGE=align"):
        read_origin(tmp_path / "align" / "projector")
