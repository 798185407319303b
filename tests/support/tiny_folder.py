"""A LLaVA folder of a few thousand random weights, and benchmark files of a few rows."""

import base64
import io
import json

import pandas as pd
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from support.small_tokenizers import byte_level

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCHES = 4


def tokenizer():
    made = byte_level("<s>", "</s>", "<|im_start|>", "<|im_end|>", adds_bos=False)
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    made.model_input_names = ["input_ids", "attention_mask"]  # as a LLaMA tokenizer's
    made.init_kwargs["model_input_names"] = made.model_input_names
    return made


def write_folder(folder, template=TEMPLATE, seed=0, text_config=LlamaConfig, **text):
    """Random but sure of its answers, and moved by pictures."""
    words = tokenizer()
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            image_size=8, patch_size=4, initializer_range=0.3,
        ),
        text_config=text_config(
            vocab_size=len(words), max_position_embeddings=512, initializer_range=0.4,
            num_key_value_heads=2, **sizes, **text,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"), image_seq_length=PATCHES,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if "multi_modal_projector" in name and name.endswith("weight"):
            torch.nn.init.normal_(weight, std=0.5)
    model.generation_config.eos_token_id = [words.convert_tokens_to_ids("<|im_end|>")]
    model.generation_config.suppress_tokens = [config.image_token_index]
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    LlavaProcessor(
        images, words, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    # Newer versions save these under other names.
    images.save_pretrained(folder)
    values = json.loads((folder / "processor_config.json").read_text())
    values.pop("image_processor", None)
    (folder / "processor_config.json").write_text(json.dumps(values))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


def picture(number, size=(12, 9)):
    """A picture of random colours."""
    torch.manual_seed(number)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def encoded(image):
    """As VLMEvalKit's files hold pictures."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def asked(text, *paths):
    """A prompt as OpenCompass's bridge to VLMEvalKit makes it."""
    content = [{"type": "image", "image_url": str(path), "text": None} for path in paths]
    content.append({"type": "text", "text": text, "image_url": None})
    return [{"role": "user", "content": content}]


def rows(dataset, count=6):
    """Lines of AI2D_TEST (four options), MMVP (pairs) or OCRBench (text), in their columns.

    The questions grow longer, each or each pair of them, so that their order is known.
    """
    if dataset == "OCRBench":
        extra = {"dataset": "made", "category": "Regular Text Recognition"}
        return [
            {"index": i, "image": encoded(picture(i)), "question": "what is written?",
             "answer": "['tea']", **extra}
            for i in range(count)
        ]  # fmt: skip
    letters, alike = ("ABCD", 1) if dataset == "AI2D_TEST" else ("AB", 2)
    options = dict(zip(letters, ("dog", "bench", "balloon", "harbour"), strict=False))
    return [
        {"index": i + 1, "image": encoded(picture(i)), "answer": letters[i % len(letters)],
         "question": f"What is shown here{' at dusk' * (i // alike)}?", **options}
        for i in range(count)
    ]  # fmt: skip


def write_data(folder, dataset, lines):
    """VLMEvalKit's format: tab-separated, pictures as base64."""
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(lines).to_csv(folder / f"{dataset}.tsv", sep="\t", index=False)
    return folder
