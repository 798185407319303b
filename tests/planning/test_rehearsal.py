"""What a rehearsal says of the user's data, and of its training."""

import json

import pytest
from support import harness

pytestmark = pytest.mark.slow

REHEARSE = {"DPA_REHEARSE": "1"}


def test_the_log_shows_a_loss_for_each_step(tiny, tmp_path):
    harness.finish("proxy", tmp_path / "run", env=REHEARSE)
    (log,) = (tmp_path / "run-rehearsal/proxy").glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8]


def test_the_users_file_is_named_where_it_has_no_usable_record(tiny, tmp_path):
    file = tmp_path / "captions.json"
    file.write_text(json.dumps([{"id": str(i), "conversations": 3} for i in range(20)]))
    message = harness.refusal(None, tmp_path / "run", f"captions.data_path={file}", env=REHEARSE)
    assert f"{file} has no usable record" in message and "inputs" not in message


def test_the_users_file_is_named_where_its_samples_cannot_be_used(tiny, tmp_path):
    file = tmp_path / "instructions.json"
    turns = [{"from": "human", "value": "long " * 3000}, {"from": "gpt", "value": "a"}]
    file.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(20)]))
    message = harness.refusal(
        None, tmp_path / "run", f"instructions.data_path={file}", env=REHEARSE
    )
    assert f"{file}" in message and "-rehearsal/inputs" not in message
    assert "the rehearsal reads the first 32 records" in message
