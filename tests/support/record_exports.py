"""Records tiny exports and what they say: `python tests/support/record_exports.py [FAMILY ...]`.

Written to tests/export/recorded/<version of transformers>/<family>: the folder that an export
gives, in float16 for its size, and said.safetensors. tests/export/test_recorded.py opens them on
whatever version runs.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from dpa_xtuner.export import export_config
from dpa_xtuner.versions import language_model
from support import runs, small_tokenizers

RECORDED = Path(__file__).parents[1] / "export/recorded"
IMAGE = Image.effect_mandelbrot((20, 20), (-3, -2.5, 2, 2.5), 100).convert("RGB")
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Two cats."}]},
    {"role": "user", "content": [{"type": "text", "text": "And the dog?"}]},
]


def opened(folder: Path, pixels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Token ids, pixels and the last logits in float32 of an exported LLaVA.

    Args:
        folder: the export.
        pixels: the image in place of what the processor makes of it.
    """
    processor = transformers.AutoProcessor.from_pretrained(folder)
    llava = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32
    )
    if llava.config.text_config.model_type == "gemma2":
        language_model(llava).config._attn_implementation = "eager"
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    inputs = processor(images=[IMAGE], text=text, return_tensors="pt")
    made = inputs["pixel_values"]
    inputs["pixel_values"] = made if pixels is None else pixels
    with torch.no_grad():
        logits = llava(**inputs).logits[0, -8:]
    return {"ids": inputs["input_ids"][0], "pixels": made, "logits": logits.contiguous()}


def record(name: str, pieces) -> None:
    folder = RECORDED / transformers.__version__ / name
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        made = runs.make(Path(temporary), pieces, name)
        export_config(made.config, work_dir=made.work_dir, dtype="float16", out=folder)
    for file in folder.glob("*.json"):  # tokenizer.json is a third of its size without spaces
        file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False))
    (folder / "dpa.json").unlink()
    save_file(opened(folder), folder / "said.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        files = {
            prefixed: small_tokenizers.train_pieces(Path(temporary, f"{prefixed}.model"), prefixed)
            for prefixed in (True, False)
        }
        for name in sys.argv[1:] or runs.KINDS:
            record(name, files.__getitem__)


if __name__ == "__main__":
    main()
