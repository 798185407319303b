"""Ask a trained model about pictures.

    python tools/chat.py work_dirs/dpa_internlm2_7b --image picture.jpg

holds a conversation in the terminal; --prompt asks one question and ends; --web opens a page on
this machine. MODEL is a run's folder or config, or an exported LLaVA folder.
"""

from pathlib import Path

from _configs import find_run, parser_of, whole


def main() -> None:
    """Open the model and talk."""
    parser = parser_of(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run's folder, its config, or an export")
    parser.add_argument("--image", type=Path, help="a picture")
    parser.add_argument("--prompt", help="one question; the answer is printed as it is made")
    parser.add_argument("--web", action="store_true", help="serve a page on this machine")
    parser.add_argument(
        "--port", type=whole(1, 65535), default=7860, help="of the page; default: 7860"
    )
    parser.add_argument("--max-new-tokens", type=whole(1), default=512, help="default: 512")
    given = parser.parse_args()
    picture = str(given.image) if given.image else None
    path = find_run(given.model, "a run's folder, its config's file or name, or an export")

    import dpa_xtuner.plugin  # noqa: F401
    from dpa_xtuner.chat import Turn, open_chat
    from dpa_xtuner.chat.terminal import ask, converse
    from dpa_xtuner.chat.web import serve
    from dpa_xtuner.errors import cli_errors

    with cli_errors():
        model = open_chat(path)
        if given.web:
            serve(model, str(path), given.max_new_tokens, given.port)
        elif given.prompt is not None or not model.takes_questions:
            ask(model, [Turn(given.prompt or "", picture)], given.max_new_tokens)
        else:
            converse(model, picture, given.max_new_tokens)


if __name__ == "__main__":
    main()
