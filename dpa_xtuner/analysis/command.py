"""What tools/conflict.py does."""

from collections.abc import Sequence
from pathlib import Path

from dpa_xtuner.analysis.conflict import Asked, by_rank, measure
from dpa_xtuner.analysis.report import REPORT_FILE, write_report
from dpa_xtuner.errors import check_installed
from dpa_xtuner.files import prepare_to_write
from dpa_xtuner.layout import ALIGN
from dpa_xtuner.stages.artifacts import read_state


def compare(
    config: Path,
    options: dict,
    captions: Sequence[str],
    llm: Sequence[str],
    samples: int,
    steps: int,
    ranks: Sequence[int],
    shares: Sequence[float],
    out: Path | None,
    work_dir: Path | None,
) -> str:
    """Measure the conflict and, of given ranks, the floor; add what a finished run has measured.

    Args:
        config: a DPA config.
        options: as of ``--cfg-options``.
        captions: files in place of the config's.
        llm: LLMs in place of the config's.
        samples: held-out captions to measure.
        steps: of a quick fit, at most.
        ranks: to compare.
        shares: of the captions, for each of the ranks; none for all captions.
        out: folder of the report; ``conflict`` in the work dir where it is None.
        work_dir: of the run; ``work_dirs/<config's name>`` where it is None.

    Returns:
        The tables, in Markdown.

    Raises:
        DPAError: settings, models or data can't be used, or matplotlib is missing.
    """
    check_installed("demo", "matplotlib")
    base = work_dir or Path(f"work_dirs/{config.stem}")
    out = out or base / "conflict"
    prepare_to_write(out / REPORT_FILE)
    asked = Asked(config, options, samples, steps, base)
    conflicts = measure(asked, llm, captions)
    floors = by_rank(asked, ranks, shares or [1.0]) if ranks else {}
    measured = {} if llm or captions else read_state(base / ALIGN).get("measured", {})
    leakage = measured if "leakage" in measured else None
    return write_report(out, conflicts, floors, leakage)
