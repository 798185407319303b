"""Records tiny exports and what they say: `python tests/support/record_exports.py [FAMILY ...]`.

Written to tests/export/recorded/<version of transformers>/<family>: the folder that an export
gives, and said.safetensors. Its weights are noise that follows from their names, which weights.json
lists with their shapes. tests/export/test_recorded.py opens them on whatever version runs.
"""

import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from dpa_xtuner.export import export_config
from dpa_xtuner.families.base import known_families
from dpa_xtuner.versions import language_model
from support import runs, small_tokenizers

RECORDED = Path(__file__).parents[1] / "export/recorded"
IMAGE = Image.effect_mandelbrot((20, 20), (-3, -2.5, 2, 2.5), 100).convert("RGB")
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Two cats."}]},
    {"role": "user", "content": [{"type": "text", "text": "And the dog?"}]},
]


def exported_on(version: str) -> set[str]:
    """The families that a version of transformers has, and exports as a LLaVA."""
    known = known_families()
    found = {name for name in runs.KINDS if Version(version) >= Version(known[name].since)}
    return found if Version(version) < Version("4.52") else found - {"gemma2"}


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


def noise(name: str, shape: list[int]) -> torch.Tensor:
    """A weight that follows from its name: RandomState's numbers are the same on all versions."""
    numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    is_scale = "norm" in name and name.endswith("weight")
    return torch.tensor(1 + 0.1 * numbers if is_scale else 0.2 * numbers, dtype=torch.float16)


def with_weights(folder: Path, out: Path) -> Path:
    """Copy a record, with the weights that it leaves out."""
    shutil.copytree(folder, out)
    shapes = out / "weights.json"
    if shapes.is_file():  # the first records hold them
        listed = json.loads(shapes.read_text())
        weights = {name: noise(name, shape) for name, shape in listed.items()}
        save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def record(name: str, pieces) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        made = runs.make(Path(temporary), pieces, name)
        folder = Path(temporary, "exported")
        export_config(made.config, work_dir=made.work_dir, dtype="float16", out=folder)
        weights = load_file(folder / "model.safetensors")
        shapes = {name: list(weight.shape) for name, weight in weights.items()}
        (folder / "weights.json").write_text(json.dumps(shapes))
        for file in folder.glob("*.json"):  # tokenizer.json is a third of its size without spaces
            file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False))
        for file in ("model.safetensors", "dpa.json", "README.md"):
            (folder / file).unlink(missing_ok=True)
        said = opened(with_weights(folder, Path(temporary, "opened")))
        save_file(said, folder / "said.safetensors")
        out = RECORDED / transformers.__version__ / name
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder, out)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        files = {
            prefixed: small_tokenizers.train_pieces(Path(temporary, f"{prefixed}.model"), prefixed)
            for prefixed in (True, False)
        }
        for name in sys.argv[1:] or exported_on(transformers.__version__):
            record(name, files.__getitem__)


if __name__ == "__main__":
    main()
