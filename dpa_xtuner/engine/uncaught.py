"""Says what is wrong with a config on which XTuner's script fails before it reaches our runner."""

import sys
from traceback import walk_tb
from types import FrameType, TracebackType

from dpa_xtuner.errors import DPAError


def answer_uncaught() -> None:
    """Let a user's mistake end the process with its message alone, not with a traceback."""
    usual = sys.excepthook

    def hook(kind: type, error: BaseException, trace: TracebackType | None) -> None:
        """Print the answer to a user's mistake; show any other error as usual."""
        if isinstance(error, (EOFError, ConnectionError)) and any(
            _function(frame) == "multiprocessing.resource_sharer._serve"
            for frame, _ in walk_tb(trace)
        ):
            return  # a dataloader worker's parent has ended, and has said so itself
        answer = error if isinstance(error, DPAError) else _mistake(error, trace)
        if answer:
            print(f"\ndpa_xtuner: {answer}", file=sys.stderr, flush=True)
        else:
            usual(kind, error, trace)

    sys.excepthook = hook


def _mistake(error: BaseException, trace: TracebackType | None) -> str:
    """Return what is wrong with the config, nothing if the error has another reason."""
    frames = [frame for frame, _ in walk_tb(trace)]
    if isinstance(cause := error.__cause__, ImportError) and _function(frames[-1]) == (
        "mmengine.config.config.fromfile"
    ):
        return f"custom_imports: {cause}: {cause.__context__}"
    if any(_function(frame).startswith("dpa_xtuner.engine.runner.") for frame in frames):
        return ""  # our runner has checked the config
    scripts = [f for f in frames if f.f_code.co_filename.endswith("xtuner/tools/train.py")]
    cfg = next((f.f_locals["cfg"] for f in scripts if "cfg" in f.f_locals), None)
    if not cfg:
        return ""
    from dpa_xtuner.stages.settings import read_settings

    try:
        read_settings(cfg)
    except DPAError as mistake:
        return str(mistake)
    return ""


def _function(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"
