"""Loads the tokenizers of InternLM2 and InternLM3 without the code in their repositories.

Both split a text at its special tokens, and tokenise the text between them by SentencePiece. A
LLaMA tokenizer does the same, so we build one from their ``tokenizer.model`` and
``tokenizer_config.json``.
"""

import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils import cached_file

from dpa_xtuner.families.internlm.llm import hub_options

_PUBLISHED = ("InternLM2Tokenizer", "InternLM2TokenizerFast", "InternLM3Tokenizer")


class InternLMTokenizer:
    """Loads the tokenizers of InternLM2 and InternLM3 as fast ones, without remote code."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, **kwargs
    ) -> PreTrainedTokenizerBase:
        """Load a published tokenizer, or one that was saved from it.

        Args:
            pretrained_model_name_or_path: a folder or a hub name.
            kwargs: arguments of ``AutoTokenizer.from_pretrained``.

        Returns:
            A fast tokenizer with the published token ids; for a tokenizer of another class, the
            result of ``AutoTokenizer``.

        Raises:
            OSError: neither a folder nor the hub has it.
        """
        name, hub = pretrained_model_name_or_path, hub_options(kwargs)
        config = json.loads(Path(cached_file(name, "tokenizer_config.json", **hub)).read_text())
        if config.get("tokenizer_class") not in _PUBLISHED:
            return AutoTokenizer.from_pretrained(name, **kwargs)
        pieces = cached_file(name, "tokenizer.model", **hub)
        added = {
            int(index): AddedToken(**token)
            for index, token in config.pop("added_tokens_decoder", {}).items()
        }
        # Drop the keys that only the published class knows.
        for key in ("auto_map", "tokenizer_class", "sp_model_kwargs", "decode_with_prefix_space"):
            config.pop(key, None)
        loading = (*hub, "trust_remote_code", "use_fast")
        config |= {key: value for key, value in kwargs.items() if key not in loading}
        tokenizer = backend(pieces, added)
        # Not LlamaTokenizerFast: transformers 5 makes it anew, with other ids and no BOS.
        if config.pop("add_bos_token", True):
            bos = config.get("bos_token", "<s>")
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B",
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            )
        config.pop("add_eos_token", None)
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path=name, **config)


def backend(pieces: str | Path, added: dict[int, AddedToken]) -> Tokenizer:
    """Build a fast tokenizer that equals SentencePiece with a BPE model.

    Args:
        pieces: a SentencePiece file with a BPE model with byte fallback.
        added: special tokens by id. If an id is that of a piece, the token replaces it: InternLM2
            put its chat tokens in the place of unused pieces.
    """
    model = SentencePieceProcessor(model_file=str(pieces))
    texts = [model.id_to_piece(i) for i in range(len(model))]
    for index, token in added.items():
        if index < len(texts):
            texts[index] = token.content
    vocab = {text: i for i, text in enumerate(texts)}
    scores = [(text, model.get_score(i)) for i, text in enumerate(texts)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            generate_merges(vocab, scores),
            unk_token=texts[model.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    specials = {
        i: AddedToken(texts[i], normalized=False, special=True)
        for i in range(len(texts))
        if model.is_control(i) or model.is_unknown(i)
    }
    specials |= added
    tokenizer.add_special_tokens([specials[i] for i in sorted(specials)])
    prefixed = model.encode("a", out_type=str)[0].startswith("▁")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefixed + [normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", left=1)] * prefixed
    )
    return tokenizer
