"""Chats with runs and exported folders, against the model that was trained."""

import base64
import json
import runpy
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from support import runs
from xtuner.utils import IMAGE_TOKEN_INDEX

from dpa_xtuner.chat import Turn, open_chat
from dpa_xtuner.chat.terminal import converse
from dpa_xtuner.chat.web import make_server
from dpa_xtuner.data.records import Record
from dpa_xtuner.errors import DPAError
from dpa_xtuner.export import export_config
from dpa_xtuner.export.chat_template import end_of_turn

pytestmark = pytest.mark.slow

TOOL = runs.ROOT / "tools" / "chat.py"
QUESTION, LENGTH = "What is it?", 6


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    return str(runs.write_image(tmp_path_factory.mktemp("picture") / "wide.png", 30, 20))


@pytest.fixture(scope="module")
def made(run):
    return run("smollm2")


@pytest.fixture(scope="module")
def chats(made):
    """A chat with the run, and one with its export."""
    folder = export_config(made.config, work_dir=made.work_dir, dtype="float32")
    return {"run": open_chat(made.work_dir), "folder": open_chat(folder)}


def greedy(made, record: Record, picture: str) -> tuple[list[int], list[int]]:
    tokens = made.prompt(record)
    ends = end_of_turn(made.settings.template, made.tokenizer)
    return tokens, made.greedy(tokens, Path(picture), LENGTH, ends, 10**6)


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_the_answer_is_that_of_the_trained_model(kind, made, chats, picture):
    turn = Turn(QUESTION, picture)
    record = Record("", ("x",), None, ((f"<image>\n{QUESTION}", "?"),))
    _, expected = greedy(made, record, picture)
    found = chats[kind].answer([turn], LENGTH)
    assert found == expected
    assert chats[kind].text(found) == made.tokenizer.decode(found, skip_special_tokens=True).strip()
    # A second question sees the first and its answer.
    turns = [turn._replace(answer="Two cats."), Turn("And the dog?")]
    _, expected = greedy(made, runs.RECORDS[1], picture)
    assert chats[kind].answer(turns, LENGTH) == expected
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    uri = Turn(QUESTION, f"data:image/png;base64,{data}")
    assert chats[kind].answer([uri], LENGTH) == found


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_probabilities_are_those_of_two_plain_passes(kind, made, chats, picture):
    record = Record("", ("x",), None, ((f"<image>\n{QUESTION}", "?"),))
    prompt, answer = greedy(made, record, picture)
    whole = prompt + answer

    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        if kind == "folder":  # which has a row of zeros more, for "<image>"
            logits = torch.cat([logits, torch.zeros(len(logits), 1)], 1)
        return logits[-len(answer) - 1 : -1].softmax(-1)

    with_image = probabilities(made.logits(whole, Path(picture)))
    count = made.resolved.tiles["image_tokens"]
    place = prompt.index(IMAGE_TOKEN_INDEX)
    text = torch.tensor([t for t in whole if t != IMAGE_TOKEN_INDEX])
    positions = torch.arange(len(text))
    positions[place:] += count  # the text keeps its positions behind the picture
    with torch.no_grad():
        # Without a mask, newer versions of transformers take a jump for another sample's start.
        inputs = {"input_ids": text, "position_ids": positions, "attention_mask": text * 0 + 1}
        logits = made.model.llm(**{k: v[None] for k, v in inputs.items()}).logits[0]
    no_image = probabilities(logits)
    tokens = chats[kind].relevance([Turn(QUESTION, picture)], answer)
    assert len(tokens) == len(answer)
    for token, w, wo, i in zip(tokens, with_image, no_image, answer, strict=True):
        assert token.p_w == pytest.approx(w[i].item(), abs=2e-5)
        assert token.p_wo == pytest.approx(wo[i].item(), abs=2e-5)
        assert token.weight == max(token.d, 0) and token.d == token.p_w - token.p_wo
    assert any(abs(token.d) > 1e-3 for token in tokens)
    # Without a picture nothing is raised.
    assert all(token.d == 0 for token in chats[kind].relevance([Turn(QUESTION)], answer))


def test_tiles_and_a_projector_that_no_folder_holds(run, picture, tmp_path):
    wide = str(runs.write_image(tmp_path / "wide.png", 64, 16))
    made = run(
        "qwen2", encoder="clip", options={"max_tiles": 4, "projector": dict(type="resampler")}
    )
    options = {"max_tiles": 4, "projector": dict(type="resampler")}
    with pytest.raises(DPAError, match=r"projector.type: was resampler, is mlp|max_tiles"):
        open_chat(made.work_dir)  # its config file says otherwise
    made.config.write_text(
        made.config.read_text() + "".join(f"{k} = {v!r}\n" for k, v in options.items())
    )
    chat = open_chat(made.work_dir)
    tiles = chat._tiling.count((64, 16))
    assert tiles > 1
    data = chat._batch([Turn(QUESTION, wide)], [])
    assert len(data["pixel_values"]) == tiles
    assert data["image_mask"].sum() == tiles * made.resolved.tiles["image_tokens"]
    assert len(chat.answer([Turn(QUESTION, wide)], 3)) <= 3


def test_captions_take_a_picture_and_no_question(run, picture):
    made = run("vicuna", stage="align")
    folder = export_config(made.config, "align", work_dir=made.work_dir, dtype="float32")
    for chat in (open_chat(made.work_dir), open_chat(folder)):
        with pytest.raises(DPAError, match="learned captions: give a picture"):
            chat.answer([Turn(QUESTION, picture)], 3)
        record = Record("", ("x",), None, (("<image>", "?"),))
        tokens = made.prompt(record)
        expected = made.greedy(tokens, Path(picture), 3, [], 10**6)
        assert chat.answer([Turn("", picture)], 3) == expected


def test_what_can_t_be_asked_is_said(chats, picture, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for chat in chats.values():
        with pytest.raises(DPAError, match="missing image: nowhere"):
            chat.answer([Turn(QUESTION, "nowhere.png")], 3)
        with pytest.raises(DPAError, match="broken image"):
            chat.answer([Turn(QUESTION, str(tmp_path / "broken.png"))], 3)
        with pytest.raises(DPAError, match="No question is given"):
            chat.answer([Turn(" ", picture)], 3)
        with pytest.raises(DPAError, match="the LLM has 512 positions"):
            chat.answer([Turn("cats " * 600, picture)], 3)
        with pytest.raises(DPAError, match="A question can't hold '<image>'"):
            chat.answer([Turn("<image>", picture)], 3)
    (tmp_path / "dpa.json").write_text('{"format": "parts"}')
    with pytest.raises(DPAError, match="an export of format parts: export it with --format hf"):
        open_chat(tmp_path)


def test_a_conversation_in_the_terminal(chats, picture, monkeypatch, capsys):
    chat = chats["run"]
    lines = iter([QUESTION, "And the dog?", "", "/image nowhere.png", QUESTION, f"/image {picture}",
                  "/what", QUESTION, "/text", QUESTION, "/quit"])  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    asked = []
    answer = chat.answer

    def answered(turns, *rest):
        asked.append([(turn.question, turn.picture) for turn in turns])
        return answer(turns, *rest)

    monkeypatch.setattr(chat, "answer", answered)
    converse(chat, picture, 3)
    first = (QUESTION, picture)
    assert asked == [[first], [first, ("And the dog?", None)], [(QUESTION, "nowhere.png")], [first],
                     [(QUESTION, None)]]  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("/image FILE") == 2 and "missing image: nowhere.png" in said
    assert chat.text(answer([Turn(*first)], 3)) in said


def test_the_command_answers_once(made, chats, picture, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    arguments = [made.work_dir, "--image", picture, "--prompt", QUESTION, "--max-new-tokens", "6"]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")
    expected = chats["run"].text(chats["run"].answer([Turn(QUESTION, picture)], 6))
    assert capsys.readouterr().out.strip().endswith(expected) and expected
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(made.work_dir), "--prompt", ""])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert caught.value.code == 1 and "No question is given" in capsys.readouterr().err


def test_the_page(chats, picture):
    chat = chats["folder"]
    expected = chat.answer([Turn(QUESTION, picture)], 6)
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    with make_server(chat, "a <run>", 6, 0) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def post(**asked) -> list[dict]:
            body = json.dumps(asked).encode()
            with urllib.request.urlopen(f"{address}/answer", body, timeout=60) as response:
                return [json.loads(line) for line in response]

        page = urllib.request.urlopen(address, timeout=60).read().decode()
        assert "a &lt;run&gt;" in page and "http" not in page.replace("<!DOCTYPE", "")
        *texts, last = post(picture=f"data:image/png;base64,{data}", question=QUESTION)
        assert "".join(piece["text"] for piece in texts).strip() == chat.text(expected)
        assert last["tokens"].count("p_wo") == len(expected)
        assert post(picture=picture, question="?") == [{"error": "This file is no picture."}]
        (wrong,) = post(picture=None, question="")
        assert wrong == {"error": "No question is given."}
        (wrong,) = post(picture="data:image/png;base64,aGk=", question="?")
        assert wrong["error"].startswith("broken image")
        elsewhere = urllib.request.Request(address, headers={"Host": "example.org:80"})
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(elsewhere, timeout=60)
        with pytest.raises(DPAError, match=f"--port {server.server_port} can't be used"):
            make_server(chat, "", 6, server.server_port)
        server.shutdown()
