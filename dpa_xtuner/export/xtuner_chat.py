"""The ``xtuner chat`` command that prompts an exported model as in training."""

import shlex
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from xtuner.utils import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX, PROMPT_TEMPLATE

from dpa_xtuner.data.encode import RecordTokenizer
from dpa_xtuner.data.records import Record
from dpa_xtuner.export.hf import load_tokenizer
from dpa_xtuner.export.source import Source

_QUESTION = f"{DEFAULT_IMAGE_TOKEN}\nWhat is shown here?"


def chat_command(
    source: Source, llm: str | None, folder: Path, has_encoder: bool
) -> dict[str, Any]:
    """Build the command that opens an export in XTuner's format.

    Args:
        source: what is exported.
        llm: the published LLM; None if ``folder`` holds the LLM.
        folder: the written export.
        has_encoder: whether it holds the visual encoder.

    Returns:
        ``command``, with FOLDER for the export's path, and ``template_differs``: the kinds of
        prompts for which xtuner chat gives other tokens than training.
    """
    command = ["xtuner", "chat", llm or "FOLDER", "--llava", "FOLDER"]
    if not has_encoder:
        command += ["--visual-encoder", source.run.settings.visual_encoder_name_or_path]
    if source.stage.sample_format == "chat":
        options, differs = _prompt_options(source, llm or folder)
    else:
        options, differs = [], ["any question: captions were learned without one"]
    command += [*options, "--image", "IMAGE"]
    return {"command": shlex.join(command), "template_differs": differs}


def _prompt_options(source: Source, llm: str | Path) -> tuple[list[str], list[str]]:
    """Find the options of xtuner chat whose tokens are nearest to training, and what differs."""
    remote = source.run.cfg.tokenizer.get("trust_remote_code", False)
    loaded = AutoTokenizer.from_pretrained(
        llm, trust_remote_code=remote, encode_special_tokens=True
    )
    trained = _trained_tokens(source)
    nearest, options = 0.0, []
    for name, stock in PROMPT_TEMPLATE.items():
        if stock.get("INSTRUCTION") != source.template["INSTRUCTION"].removeprefix("<s>"):
            continue
        system = _system(source.template, stock)
        tokens = _chat_tokens(loaded, stock, system)
        near = SequenceMatcher(None, tokens, trained, autojunk=False).ratio()
        if near > nearest:
            nearest, options = near, ["--prompt-template", name]
            options += [] if system is None else ["--system", system]
    return options, [] if nearest == 1 else ["1 turn(s) with an image"]


def _system(template: dict[str, Any], stock: dict[str, Any]) -> str | None:
    """Find the system prompt that makes XTuner's template write our default one, if any."""
    if template.get("DEFAULT_SYSTEM") is None or "SYSTEM" not in template:
        return None
    wanted = template["SYSTEM"].format(system=template["DEFAULT_SYSTEM"])
    # XTuner's Vicuna writes its default itself; our Llama 3.1 writes dates before the prompt.
    before, _, after = (stock.get("SYSTEM") or "{system}").partition("{system}")
    return wanted.removeprefix(before).removesuffix(after)


def _chat_tokens(
    tokenizer: PreTrainedTokenizerBase, template: dict[str, Any], system: str | None
) -> list[int]:
    """Tokenise the first prompt of ``xtuner chat --image``, as xtuner.tools.chat (0.2.0) does."""
    before = ""
    if system is not None and "SYSTEM" in template:
        before = template["SYSTEM"].format(system=system, round=1, bot_name="BOT")
    asked = template["INSTRUCTION"].format(input=_QUESTION, round=1, bot_name="BOT")
    first, after = (before + asked).split(DEFAULT_IMAGE_TOKEN)
    ids = tokenizer.encode(first), tokenizer.encode(after, add_special_tokens=False)
    return [*ids[0], IMAGE_TOKEN_INDEX, *ids[1]]


def _trained_tokens(source: Source) -> list[int]:
    encode = RecordTokenizer(load_tokenizer(source), "chat", 1, source.template, 2**20)
    encoded = encode([Record("", ("x",), None, ((_QUESTION, "Two cats."),))])
    return encoded.tokens[: encoded.supervised.argmax()].tolist()
