"""Small tokenizers of the kinds that the families have."""

import io

from sentencepiece import SentencePieceTrainer
from tokenizers import ByteLevelBPETokenizer, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dpa_xtuner.families.internlm.tokenizer import backend

TEXT = [
    "A red balloon drifts over the harbour at dusk. USER: ASSISTANT: user assistant system",
    "Two cats sleep on a wooden bench. What are they doing? [INST] [/INST] <<SYS>> <</SYS>>",
    "What is shown here? And the dog? It sleeps. Be brief. You are a helpful assistant.",
]
UNUSED = [f"[UNUSED_TOKEN_{i}]" for i in range(4)]


def byte_level(bos, eos, *others, adds_bos):
    """A byte-level BPE (Qwen, Llama-3, SmolLM2) with special tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXT * 5, vocab_size=400, special_tokens=[bos, eos, *others])
    tokenizer = bpe._tokenizer
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def train_pieces(path, prefixed):
    """Writes a SentencePiece file: a space before a text or none."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        add_dummy_prefix=prefixed,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        control_symbols=UNUSED,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def llama(pieces, kind, *others):
    """A LLaMA tokenizer; legacy: a space before every stretch, new: before the first only."""
    tokenizer = backend(pieces, {})
    if kind == "new":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": list(others)})
    return made
