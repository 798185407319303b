"""A page on this machine: a picture, a question, the answer, and what the picture did for it.

The page is served by Python's own server and loads nothing from elsewhere. Gradio would be the
usual choice: its versions today want another Pillow and another huggingface-hub than XTuner's
transformers.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from transformers import TextIteratorStreamer

from dpa_xtuner import pages
from dpa_xtuner.chat.models import ChatModel, Turn
from dpa_xtuner.errors import DPAError

_PAGE, _TOKENS = (Path(__file__).with_name(f"{name}.html") for name in ("page", "answer"))
_LARGEST = 64 << 20  # bytes of a question with its picture
_HOSTS = ("127.0.0.1", "localhost")


def answers(model: ChatModel, turn: Turn, max_new_tokens: int) -> Iterator[dict[str, str]]:
    """Answer a question, piece by piece.

    Args:
        model: what answers.
        turn: the question and its picture.
        max_new_tokens: the largest length of the answer.

    Returns:
        Pieces of ``text``; then ``tokens``, HTML of the answer with its tokens coloured; or an
        ``error`` for people.
    """
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    last: dict[str, str] = {}

    def work() -> None:
        """Answer, then compare the answer's tokens with and without the picture."""
        try:
            made = model.answer([turn], max_new_tokens, streamer)
            last["tokens"] = pages.render(_TOKENS, tokens=model.relevance([turn], made))
        except DPAError as error:
            last["error"] = str(error)
        except Exception as error:
            last["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:  # the model may have failed before it ended the text
            streamer.text_queue.put(streamer.stop_signal)

    worker = Thread(target=work)
    worker.start()
    yield from ({"text": text} for text in streamer)
    worker.join()
    yield last


def make_server(
    model: ChatModel, title: str, max_new_tokens: int, port: int
) -> ThreadingHTTPServer:
    """Make the page's server, on this machine's own address; it answers one question at a time.

    Args:
        model: what answers.
        title: of the page.
        max_new_tokens: the largest length of an answer.
        port: of the page's address; 0 for any.

    Raises:
        DPAError: the port is taken.
    """
    one_at_a_time = Lock()
    page = pages.render(_PAGE, title=title, takes_questions=model.takes_questions).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Send the page."""
            found = self._is_local() and self.path == "/"
            self._begin(200 if found else 404, "text/html; charset=utf-8")
            self.wfile.write(page if found else b"not found")

        def do_POST(self) -> None:
            """Send the pieces of an answer, each a line of JSON, as they are made."""
            size = int(self.headers.get("Content-Length") or 0)
            if not self._is_local() or self.path != "/answer" or size > _LARGEST:
                self._begin(404, "text/plain")
                return
            asked = json.loads(self.rfile.read(size))
            picture = asked.get("picture") or None
            self._begin(200, "application/x-ndjson")
            if picture and not picture.startswith("data:image/"):  # no files of this machine
                self._line({"error": "This file is no picture."})
                return
            with one_at_a_time:
                for piece in answers(model, Turn(asked["question"], picture), max_new_tokens):
                    self._line(piece)

        def _is_local(self) -> bool:
            return self.headers.get("Host", "").rpartition(":")[0] in _HOSTS

        def _begin(self, status: int, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()

        def _line(self, piece: dict[str, str]) -> None:
            with suppress(OSError):  # the page was closed; the answer is made to its end
                self.wfile.write(json.dumps(piece).encode() + b"\n")
                self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            return  # the terminal shows the address alone

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise DPAError(f"--port {port} can't be used ({error.strerror}): give another.") from None


def serve(model: ChatModel, title: str, max_new_tokens: int, port: int) -> None:
    """Show the page until Ctrl-C; the arguments are those of :func:`make_server`."""
    with make_server(model, title, max_new_tokens, port) as server:
        print(f"Open http://127.0.0.1:{server.server_port} (Ctrl-C ends)", flush=True)
        server.serve_forever()
