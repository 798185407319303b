"""Train the demo's vision encoder on OpenMoji drawings and write its weights.

The shipped weights come from running this without arguments, after `tools/prepare_demo.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpa_xtuner.demo import vit
from dpa_xtuner.demo.drawings import catalogue
from dpa_xtuner.demo.prepare import LLM_FOLDER, SHIPPED_VIT

SEED = 0
STEPS = 1000
BATCH_SIZE = 96
LEARNING_RATE = 7e-4


def main(llm_folder: Path, out: Path) -> None:
    """Train, print the held-out retrieval accuracy, write the weights.

    Args:
        llm_folder: Language model whose word embeddings stand for the names.
        out: Folder to write.
    """
    torch.manual_seed(SEED)
    llm = AutoModelForCausalLM.from_pretrained(llm_folder)
    tower = vit.NameTower(llm, AutoTokenizer.from_pretrained(llm_folder))
    names = sorted({drawing.name for drawing in catalogue() if not drawing.held_out})
    model = vit.DrawingClip(tower, names)
    vit.train(model, vit.Batches(model, SEED), STEPS, BATCH_SIZE, LEARNING_RATE)
    for label, accuracy in vit.held_out_retrieval(model).items():
        print(f"held-out retrieval, {label}: {accuracy:.1%}")
    vit.save(model, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", type=Path, default=Path("data") / LLM_FOLDER)
    parser.add_argument("--out", type=Path, default=SHIPPED_VIT)
    arguments = parser.parse_args()
    main(arguments.llm, arguments.out)
