"""Names of a run's folders and files. Light: it imports nothing."""

PROXY, ALIGN, TUNE = STAGE_NAMES = ("proxy", "align", "tune")
"""All stages in their order; each has a folder of this name in the work dir. A method without a
proxy has the last two, a run that begins with a given projector (``tune.init_projector``) the last
one."""

LLM, LLM_ADAPTER, VISUAL_ENCODER, PROJECTOR = "llm", "llm_adapter", "visual_encoder", "projector"
"""The components of a model; a stage writes each to a folder of this name in its own folder."""

STATE_FILE = "stage.json"
"""In a stage's folder: how far the stage is, and from what it is trained."""

PROVENANCE_FILE = "dpa.json"
"""In each folder that a stage or an export writes: from what it was made."""

HF_FOLDER = "hf"
"""In a stage's folder: its export as a Hugging Face LLaVA."""
