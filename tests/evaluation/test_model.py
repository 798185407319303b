"""LlavaFolder against plain transformers, one sample at a time, in float32."""

import json
import shutil

import pytest
import torch
from opencompass.models.base import BaseModel
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny_folder import PATCHES, asked, picture, write_folder
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    Gemma2Config,
    LlavaForConditionalGeneration,
    SiglipImageProcessor,
)
from xtuner.dataset.utils import expand2square

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation import llava as loading
from dpa_xtuner.evaluation.benchmarks import NO_ANSWER
from dpa_xtuner.evaluation.model import LlavaFolder, padded
from dpa_xtuner.evaluation.text_model import load_llm
from dpa_xtuner.versions import language_model

TOKENS = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    paths = [tmp_path_factory.mktemp("pictures") / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        picture(i, (12, 9 + 3 * i)).save(path)
    return paths


@pytest.fixture(scope="module")
def llava(folder):
    return LlavaFolder(str(folder))


def plain_answer(folder, messages, tokens=TOKENS):
    """What anybody would write with transformers: one prompt, the processor, model.generate."""
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    paths = [b["image_url"] for m in messages for b in m["content"] if b["type"] == "image"]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [Image.open(path) for path in paths] or None
    inputs = processor(images=images, text=prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True).strip()


def prompts(pictures):
    return [
        asked("What are they doing? Be brief. Two cats sleep on a wooden bench.", pictures[0]),
        asked("What is shown here?", pictures[1]),
        asked("Compare these.", pictures[2], pictures[3]),
        asked("A question without a picture"),
    ]


def test_a_batch_is_answered_as_each_sample_alone(folder, llava, pictures):
    expected = [plain_answer(folder, messages) for messages in prompts(pictures)]
    assert llava.generate(prompts(pictures), TOKENS) == expected
    assert len(set(expected)) == len(expected) and all(expected)
    assert isinstance(llava, BaseModel)


def test_the_picture_matters(llava, pictures):
    assert len(set(llava.generate([asked("What?", p) for p in pictures], TOKENS))) > 1


def attentions(llava) -> list[str]:
    """That of the LLM and of the visual encoder."""
    inner = getattr(llava.model, "model", llava.model)
    return [part.config._attn_implementation for part in (inner.language_model, inner.vision_tower)]


def test_gemma2_caps_its_attention(tmp_path, pictures):
    """SDPA would leave the cap out, and gives other answers."""
    gemma = dict(attn_logit_softcapping=0.5, head_dim=16, tie_word_embeddings=False)
    gemma["final_logit_softcapping"] = None  # which newer versions refuse in a LLaVA
    folder = write_folder(tmp_path, text_config=Gemma2Config, **gemma)
    llava = LlavaFolder(str(folder))
    assert attentions(llava)[0] == "eager"
    found = llava.generate(prompts(pictures), TOKENS)
    assert found == [llava.generate([messages], TOKENS)[0] for messages in prompts(pictures)]
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    ids, pixels = llava.encode_messages(prompts(pictures)[0])
    inputs = dict(input_ids=torch.tensor([ids]), pixel_values=torch.cat(pixels))
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :]
    assert llava.tokenizer.decode(output, skip_special_tokens=True).strip() == found[0]


def test_attention_is_not_the_slow_one(folder, llava, tmp_path):
    """Also where transformers has saved that it had chosen one, and not which."""
    assert attentions(llava) == ["sdpa", "sdpa"]
    saved = shutil.copytree(folder, tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["_attn_implementation_autoset"] = True
    (saved / "config.json").write_text(json.dumps(config))
    assert attentions(LlavaFolder(str(saved))) == ["sdpa", "sdpa"]


def test_image_tag_in_a_question_is_text(llava, pictures):
    question = "What does <image> mean? <image><image>"
    ids, pixels = llava.encode_messages(asked(question, pictures[0]))
    assert len(pixels) == 1 and ids.count(llava.image_id) == PATCHES
    assert f"{question}<|im_end|>" in llava.tokenizer.decode(ids)
    (answer,) = llava.generate([asked(question)], TOKENS)
    assert not answer.startswith(NO_ANSWER)


def test_failing_samples_fail_alone(folder, llava, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:60])
    batch = [
        asked("What is shown here?", pictures[1]),
        asked("broken", broken),
        asked("missing", tmp_path / "nowhere.png"),
        [{"role": "user", "content": [{"type": "image", "image_url": None, "text": None}]}],
        asked("A red balloon " * 400, pictures[0]),
        asked(" \n", pictures[0]),
    ]
    answers = llava.generate(batch, TOKENS)
    assert answers[0] == plain_answer(folder, batch[0])
    reasons = [
        "broken.png|truncated|identify",
        "No such file",
        "no picture",
        "512 positions",
        "no question",
    ]
    for answer, reason in zip(answers[1:], reasons, strict=True):
        assert answer.startswith(f"{NO_ANSWER}: ")
        assert any(words in answer for words in reason.split("|")), answer


def test_a_batch_that_raises_is_halved_until_the_culprit_is_alone(llava, pictures, monkeypatch):
    batch = [asked(f"What is shown here? {i}", p) for i, p in enumerate(pictures)]
    expected = llava.generate(batch, TOKENS)
    sizes, plain = [], llava.model.generate

    def fails(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 2 or any("2" in llava.tokenizer.decode(row) for row in input_ids):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(llava.model, "generate", fails)
    answers = llava.generate(batch, TOKENS)
    assert answers[:2] + answers[3:] == expected[:2] + expected[3:]
    assert answers[2].startswith(f"{NO_ANSWER}: OutOfMemoryError: CUDA out of memory")
    assert sizes == [4, 2, 2, 1, 1]


def test_a_lost_gpu_is_everybodys_trouble(llava, monkeypatch):
    def fails(**kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(llava.model, "generate", fails)
    with pytest.raises(RuntimeError, match="device-side"):
        llava.generate([asked("What?"), asked("Why?")], TOKENS)


def test_an_empty_answer_is_a_failure(llava, monkeypatch):
    eos = llava.tokenizer.convert_tokens_to_ids("<|im_end|>")
    monkeypatch.setattr(
        llava.model, "generate",
        lambda input_ids, **_: torch.cat([input_ids, torch.full((len(input_ids), 1), eos)], 1),
    )  # fmt: skip
    assert llava.generate([asked("What?")], TOKENS) == [f"{NO_ANSWER}: empty answer"]


@pytest.mark.parametrize("size", [(7, 4), (4, 7), (5, 5), (1, 6)])
def test_padding_is_that_of_training(size):
    colour = (122, 116, 104)
    expected = expand2square(picture(0, size), colour)
    assert padded(picture(0, size), colour).tobytes() == expected.tobytes()


def test_folder_says_that_it_was_trained_on_padded_pictures(folder, llava, pictures, tmp_path):
    padding = shutil.copytree(folder, tmp_path / "padding")
    (padding / "dpa.json").write_text(json.dumps({"pad_image_to_square": True}))
    pads = LlavaFolder(str(padding))
    ids, (pixels,) = llava.encode_messages(prompts(pictures)[0])
    pad_ids, (pad_pixels,) = pads.encode_messages(prompts(pictures)[0])
    assert ids == pad_ids and not torch.equal(pixels, pad_pixels)
    processor = pads.processor.image_processor
    square = expand2square(
        Image.open(pictures[0]), tuple(int(x * 255) for x in processor.image_mean)
    )
    assert torch.equal(pad_pixels, processor(square, return_tensors="pt")["pixel_values"])


def test_template_of_the_tokenizer_or_llava_1_5s(folder, pictures, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "chat_template.json").unlink()
    ids, _ = LlavaFolder(str(bare)).encode_messages(asked("What is shown here?", pictures[0]))
    image = "<image>" * PATCHES
    text = LlavaFolder(str(bare)).tokenizer.decode(ids)
    assert text.startswith("A chat between a curious human")
    assert text.endswith(f"questions. USER: {image}\nWhat is shown here? ASSISTANT:")

    config = json.loads((bare / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    llava = LlavaFolder(str(bare))
    ids, _ = llava.encode_messages(asked("What is shown here?", pictures[0]))
    assert llava.tokenizer.decode(ids) == f"[user] {image}\nWhat is shown here?"


def test_bos_is_there_once(folder, tmp_path, pictures):
    """Whether the template writes it or the tokenizer adds it."""
    words = json.loads((folder / "tokenizer.json").read_text())
    template = {"Sequence": {"id": "A", "type_id": 0}}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    words["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, template], "pair": [bos, template],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }  # fmt: skip
    for name in ("added", "written"):
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / "tokenizer.json").write_text(json.dumps(words))
    found = json.loads((copy / "chat_template.json").read_text())["chat_template"]
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": "<s>" + found}))
    added, written = (LlavaFolder(str(tmp_path / name)) for name in ("added", "written"))
    ids, _ = added.encode_messages(asked("<image>?", pictures[0]))
    assert ids == written.encode_messages(asked("<image>?", pictures[0]))[0]
    assert ids[0] == 0 and ids.count(0) == 1


def test_named_templates(folder, pictures, tmp_path):
    """Of the processor or of the tokenizer; the default, or else the first."""
    named = shutil.copytree(folder, tmp_path / "named")
    template = json.loads((named / "chat_template.json").read_text())["chat_template"]
    expected = LlavaFolder(str(folder)).encode_messages(asked("What?", pictures[0]))[0]
    config = json.loads((named / "tokenizer_config.json").read_text())
    for name, where in (("default", "chat_template.json"), ("chat", "tokenizer_config.json")):
        found = [{"name": name, "template": template}, {"name": "tools", "template": "x"}]
        found = found[::-1] if name == "default" else found
        (named / where).write_text(json.dumps(config | {"chat_template": found}))
        assert LlavaFolder(str(named)).encode_messages(asked("What?", pictures[0]))[0] == expected
        (named / "chat_template.json").unlink(missing_ok=True)


def test_generation_config_of_other_outputs(folder, llava, pictures, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "generation_config.json").read_text())
    config |= {"return_dict_in_generate": True, "output_scores": True}
    (other / "generation_config.json").write_text(json.dumps(config))
    batch = prompts(pictures)[:2]
    assert LlavaFolder(str(other)).generate(batch, TOKENS) == llava.generate(batch, TOKENS)


@pytest.mark.parametrize("kind", [CLIPImageProcessor, SiglipImageProcessor])
def test_thin_pictures(kind, llava, monkeypatch):
    """As the same picture turned, which has its channels where none can mistake them."""
    sides = {"height": 8, "width": 8}
    options = dict(size={"shortest_edge": 8}, crop_size=sides)
    processor = kind(**options) if kind is CLIPImageProcessor else kind(size=sides)
    monkeypatch.setattr(llava.processor, "image_processor", processor)
    for size in ((5, 1), (5, 3)):
        thin = picture(0, size)
        one, other = (llava._pixels(p) for p in (thin, thin.transpose(Image.Transpose.TRANSPOSE)))
        assert one.shape == (1, 3, 8, 8)
        assert (one - other.transpose(2, 3)).abs().mean() < 0.01  # resizing rounds in between
    ordinary = picture(0, (12, 9))
    expected = processor(ordinary, return_tensors="pt")["pixel_values"]
    assert torch.equal(llava._pixels(ordinary), expected)


def changed(folder, copy, change):
    """A copy of a folder whose dict of weights went through `change`."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return str(copy)


@pytest.mark.parametrize(
    ("part", "count", "first"),
    [
        ("vision_tower.", 55, r"\S*vision_tower\.\S*embeddings.class_embedding is missing"),
        ("multi_modal_projector.linear_2.bias", 1, r"\S*multi_modal_projector.linear_2.bias is"),
        ("language_model.lm_head", 1, r"\S*lm_head.weight is missing"),
    ],
)
def test_missing_weights_are_refused(part, count, first, folder, tmp_path):
    """transformers would leave them to chance, or take them for tied to others of their size."""

    def lose(weights):
        for name in [name for name in weights if name.startswith(part)]:
            del weights[name]

    copy = changed(folder, tmp_path / "copy", lose)
    for load in (LlavaFolder, load_llm):
        with pytest.raises(DPAError, match=f"{count} weights are missing .* first: {first}"):
            load(copy)


def test_weights_of_another_shape_are_refused_and_unknown_ones_said(folder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(loading, "print_log", lambda line, *_: said.append(line))

    def add(weights):
        weights["language_model.model.layers.9.mlp.weight"] = torch.zeros(2)

    LlavaFolder(changed(folder, tmp_path / "more", add))
    (line,) = said
    assert "1 weights belong to no module of the model" in line and "layers.9.mlp.weight" in line

    def cut(weights):
        weights["multi_modal_projector.linear_1.bias"] = torch.zeros(7)

    with pytest.raises(DPAError, match=r"linear_1.bias has the shape \(7,\), expected \(32,\)"):
        LlavaFolder(changed(folder, tmp_path / "less", cut))


def test_a_tied_head_is_not_missing(tmp_path):
    folder = write_folder(tmp_path, tie_word_embeddings=True)
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
    llm = language_model(LlavaFolder(str(folder)).model)
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    llm.save_pretrained(tmp_path / "llm")
    assert load_llm(str(tmp_path / "llm")).lm_head.weight.equal(llm.lm_head.weight)
    config = json.loads((tmp_path / "llm/config.json").read_text())
    config["tie_word_embeddings"] = False
    (tmp_path / "llm/config.json").write_text(json.dumps(config))
    with pytest.raises(
        DPAError, match=r"1 weights are missing .* first: lm_head.weight is missing"
    ):
        load_llm(str(tmp_path / "llm"))


def test_other_models_are_refused(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "image_token_index": 5}))
    with pytest.raises(DPAError, match="no token '<image>' with the id 5"):
        LlavaFolder(str(other))
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(
        DPAError, match="is a model of type 'llama'; expected the folder of a Llava"
    ):
        LlavaFolder(str(other))
