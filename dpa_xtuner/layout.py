"""Names of a run's folders and files. Any process can import it: it needs no other package."""

from pathlib import Path

PROXY, ALIGN, TUNE = STAGE_NAMES = ("proxy", "align", "tune")
"""All stages in their order; each has a folder of this name in the work dir. A method without a
proxy has the last two; a run that starts from a given projector (``tune.init_projector``) has the
last one."""

LLM, LLM_ADAPTER, VISUAL_ENCODER, PROJECTOR = COMPONENT_NAMES = (
    "llm", "llm_adapter", "visual_encoder", "projector",
)  # fmt: skip
"""The components of a model; a stage writes each to a folder of this name in its own folder."""

STATE_FILE = "stage.json"
"""In a stage's folder: how far the stage is, and what it is trained from."""

PROVENANCE_FILE = "dpa.json"
"""In each folder that a stage or an export writes: what it was made from."""

HF_FOLDER = "hf"
"""In a stage's folder: its export as a Hugging Face LLaVA."""


def shipped(folder: str) -> Path:
    """Find a folder that comes with the package: ``configs`` or ``tools``.

    An installation has it inside the package, a checkout has it beside the package.
    """
    inside = Path(__file__).with_name(folder)
    return inside if inside.is_dir() else Path(__file__).parents[1] / folder
