"""The conversation in a terminal."""

from pathlib import Path

from transformers import TextStreamer

from dpa_xtuner.chat.models import ChatModel, Turn
from dpa_xtuner.errors import DPAError

HELP = """\
Type a question. These begin a new conversation: /image FILE (about another picture), /text (about
no picture), /new (about the same one). /quit or Ctrl-D ends."""


def ask(model: ChatModel, turns: list[Turn], max_new_tokens: int) -> str:
    """Answer the last turn, print the answer while it is made, and return it."""
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return model.text(model.answer(turns, max_new_tokens, streamer))


def converse(model: ChatModel, picture: str | None, max_new_tokens: int) -> None:
    """Read questions from standard input until it ends.

    Args:
        model: what answers.
        picture: the picture of the first question.
        max_new_tokens: the largest length of an answer.
    """
    print(HELP)
    turns: list[Turn] = []
    while (line := _line()) is not None:
        command, _, rest = line.partition(" ")
        if command == "/image":
            turns, picture = [], str(Path(rest.strip()).expanduser())
        elif command == "/text":
            turns, picture = [], None
        elif command == "/new":
            turns = []
        elif command.startswith("/"):
            print(HELP)
        if command.startswith("/") or not line:
            continue
        asked = Turn(line, None if turns else picture)
        try:
            answer = ask(model, [*turns, asked], max_new_tokens)
        except DPAError as error:
            print(error)
        else:
            turns.append(asked._replace(answer=answer))


def _line() -> str | None:
    try:
        line = input("> ").strip()
    except EOFError:
        print()
        return None
    return None if line == "/quit" else line
