"""Asks exported folders with plain transformers: `python plain.py IMAGE JOBS.json OUT.pt`."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

torch.set_num_threads(1)


def answer(folder: str, conversations: list, image: Image.Image, tokens: int) -> dict:
    processor = AutoProcessor.from_pretrained(folder)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, torch_dtype="auto", output_loading_info=True
    )
    found = {"info": info, "dtype": model.dtype, "logits": [], "exact": [], "ids": [], "said": []}
    for messages in conversations:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=[image], text=text, return_tensors="pt")
        inputs = inputs.to(model.dtype) if model.dtype != torch.float32 else inputs
        with torch.no_grad():
            found["logits"].append(model(**inputs).logits[0].float())
        said = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        found["ids"].append(inputs["input_ids"][0].tolist())
        found["said"].append(said[0, inputs["input_ids"].shape[1] :].tolist())
    llm = model.language_model if hasattr(model, "language_model") else model.model.language_model
    llm.config._experts_implementation = "eager"  # torch's grouped_mm has no float64
    model.double()
    for messages in conversations:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=[image], text=text, return_tensors="pt").to(torch.float64)
        with torch.no_grad():
            found["exact"].append(model(**inputs).logits[0])
    found["attention"] = llm.config._attn_implementation
    found["ends"] = model.generation_config.eos_token_id
    found["image_id"] = model.config.image_token_index
    return found


image = Image.open(sys.argv[1]).convert("RGB")
jobs = json.loads(Path(sys.argv[2]).read_text())
found = {name: answer(*job, image, 8) for name, job in jobs.items()}
ours = [name for name in sys.modules if name.split(".")[0] in ("dpa_xtuner", "xtuner")]
assert not ours, ours
torch.save(found, sys.argv[3])
