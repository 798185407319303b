"""InternLM's tokenizers without remote code, against SentencePiece itself."""

import json
import re
import shutil

import pytest
from mmengine.utils import get_object_from_string
from sentencepiece import SentencePieceProcessor
from support.published_templates import VICUNA
from support.small_tokenizers import UNUSED
from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

from dpa_xtuner.families import find_family
from dpa_xtuner.families.internlm.tokenizer import InternLMTokenizer
from dpa_xtuner.families.template_check import check_template

CHAT = ["<|plugin|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
TEXTS = [
    "A red balloon drifts over the harbour at dusk.",
    "<|im_start|>user\nWhat is shown here?<|im_end|>\n<|im_start|>assistant\n",
    "  Two   cats \n\n sleep,\tbyte by byte: ü 中文 🎈 <|im_end|> <|im_end|>\n",
    "<|plugin|>[UNUSED_TOKEN_9] <s>x</s>12345",
    "",
]


@pytest.fixture(params=[False, True], ids=["without a prefix space", "with a prefix space"])
def folder(pieces, tmp_path, request):
    """A folder as published: its chat tokens stand where unused pieces were."""
    shutil.copy(pieces(request.param), tmp_path / "tokenizer.model")
    model = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2}
    ids |= {chat: model.piece_to_id(piece) for chat, piece in zip(CHAT, UNUSED, strict=True)}
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": text, **flags} for text, i in ids.items()},
        "additional_special_tokens": CHAT,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
        "clean_up_tokenization_spaces": False,
        "decode_with_prefix_space": False,
        "eos_token": "</s>",
        "pad_token": "</s>",
        "sp_model_kwargs": None,
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def by_sentencepiece(folder, text):
    """What the published slow tokenizer does: pieces between special tokens."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    special = {t["content"]: int(i) for i, t in config["added_tokens_decoder"].items()}
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [special["<s>"]]
    for part in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        ids += [special[part]] if part in special else model.encode(part)
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_published_ones(folder, text):
    tokenizer = InternLMTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    ids = tokenizer(text).input_ids
    assert ids == by_sentencepiece(folder, text)
    # Decoding shows a prefix space as a space, as InternLM's own does.
    assert tokenizer.decode(ids[1:]).replace(" ", "") == text.replace(" ", "")


def test_it_is_a_llama_tokenizer_of_the_published_size(folder):
    tokenizer = InternLMTokenizer.from_pretrained(str(folder), padding_side="right")
    assert type(tokenizer) is PreTrainedTokenizerFast
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert len(tokenizer) == len(model)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.padding_side == "right"
    assert tokenizer.name_or_path == str(folder)
    assert tokenizer.all_special_tokens[-len(CHAT) :] == CHAT
    assert tokenizer.apply_chat_template([{"role": "user", "content": "A"}], tokenize=False) == (
        "<s>A"
    )


def test_what_is_saved_needs_no_loader_of_ours(folder, tmp_path):
    tokenizer = InternLMTokenizer.from_pretrained(str(folder))
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert "auto_map" not in saved
    for load in (AutoTokenizer, InternLMTokenizer):
        again = load.from_pretrained(str(tmp_path / "saved"))
        assert type(again) is PreTrainedTokenizerFast
        assert again.chat_template == tokenizer.chat_template
        for text in TEXTS:
            assert again(text).input_ids == tokenizer(text).input_ids


def test_a_missing_folder_is_an_os_error():
    with pytest.raises(OSError):
        InternLMTokenizer.from_pretrained("internlm/internlm2_5-7b-chat", local_files_only=True)


@pytest.mark.parametrize("name", ["internlm2", "internlm3"])
def test_the_families_use_it(name):
    loader = get_object_from_string(find_family(name).tokenizer)
    assert loader == InternLMTokenizer.from_pretrained


def test_vicunas_tokenizer_is_a_sentencepiece_file_alone(pieces, tmp_path):
    """What transformers makes of it, by way of protobuf, agrees with the template too."""
    shutil.copy(pieces(True), tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    config |= {"chat_template": VICUNA}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(tokenizer) is LlamaTokenizerFast
    check_template(find_family("vicuna"), tokenizer, "vicuna")
