"""Says what is wrong with a config on which XTuner's script fails before it reaches our runner."""

import sys
from collections.abc import Callable
from traceback import walk_tb
from types import FrameType, TracebackType

from dpa_xtuner.errors import DPAError


def answer_uncaught() -> None:
    """Let a user's mistake end the process with its message alone, not with a traceback."""
    sys.excepthook = _instead_of(sys.excepthook)


def _instead_of(usual: Callable) -> Callable:
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

    return hook


def _mistake(error: BaseException, trace: TracebackType | None) -> str:
    """Return what is wrong with the config, nothing if the error has another reason."""
    frames = [frame for frame, _ in walk_tb(trace)]
    functions = {_function(frame): frame for frame in frames}
    if isinstance(cause := error.__cause__, ImportError) and _function(frames[-1]) == (
        "mmengine.config.config.fromfile"
    ):
        return f"custom_imports: {cause}: {cause.__context__}"
    if any(name.startswith("dpa_xtuner.engine.runner.") for name in functions):
        return ""  # our runner has checked the config
    script = next((frame for name, frame in functions.items() if _is_script(name, frame)), None)
    cfg = script and script.f_locals.get("cfg")
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


def _is_script(name: str, frame: FrameType) -> bool:
    """Tell whether this is the main function of XTuner's training script."""
    file = frame.f_code.co_filename.replace("\\", "/")
    return name.endswith(".main") and file.endswith("xtuner/tools/train.py")
