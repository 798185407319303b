"""Measure the first pass over Parquet rows with pictures inside against ``datasets.map``.

Each start runs in a process of its own, on the same generated rows of The Cauldron's shape, with
the same tokenizer:

    python benchmarks/benchmark_rows.py --rows 100000 --json benchmark.json

``datasets.map`` tokenises questions and answers and keeps labels beside them; it neither opens
pictures nor lays a template around the text.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_GROUP = 100  # rows of a row group, as datasets writes pictures
_KINDS = ("datasets.map", "ours", "ours, second start")
_TEMPLATE = {"INSTRUCTION": "USER: {input} ASSISTANT: ", "SEP": "\n"}


def write_rows(folder: Path, rows: int) -> None:
    """Write ``rows.parquet``, pictures of noise in it, and a small byte-level BPE tokenizer."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(2000)]

    def text(least: int, most: int) -> str:
        return " ".join(words[i] for i in rng.integers(0, 2000, rng.integers(least, most)))

    pictures = []
    for _ in range(50):
        content = io.BytesIO()
        noise = rng.integers(0, 256, (96, 128, 3), np.uint8)
        Image.fromarray(noise).save(content, "JPEG")
        pictures.append({"bytes": content.getvalue(), "path": None})
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("user", pa.string()), ("assistant", pa.string())])
    schema = pa.schema([("images", pa.list_(picture)), ("texts", pa.list_(turn))])
    with pq.ParquetWriter(folder / "rows.parquet", schema) as writer:
        for start in range(0, rows, _GROUP):
            size = min(_GROUP, rows - start)
            chosen = rng.integers(0, 50, size)
            texts = [
                [{"user": text(5, 15), "assistant": text(10, 40)} for _ in range(2)]
                for _ in range(size)
            ]
            columns = {"images": [[pictures[i]] for i in chosen], "texts": texts}
            writer.write_table(pa.table(columns, schema=schema), row_group_size=_GROUP)
    bpe = ByteLevelBPETokenizer()
    sample = [text(20, 40) for _ in range(2000)]
    bpe.train_from_iterator(sample, vocab_size=4000, special_tokens=["<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def measure(kind: str, folder: Path, processes: int) -> dict[str, float]:
    """Tokenise the rows in this process.

    Args:
        kind: one of ``_KINDS``.
        folder: from ``write_rows``.
        processes: that tokenise.

    Returns:
        Seconds, rows, and memory beyond the imports in MB, as it is then and the peak.
    """
    import psutil
    from transformers import AutoTokenizer, CLIPImageProcessor

    from dpa_xtuner.data import DPADataset

    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = folder / "rows.parquet"
    imports = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    if kind == "datasets.map":
        rows = _map(file, folder, tokenizer, processes)
    else:
        dataset = DPADataset(
            file, "", tokenizer, CLIPImageProcessor(), "chat", 576, _TEMPLATE, num_proc=processes
        )
        rows = len(dataset.modality_length)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "rows": rows,
        "rss_mb": (psutil.Process().memory_info().rss - imports) / 1e6,
        "peak_mb": (peak - imports) / 1e6,
    }


def _map(file: Path, folder: Path, tokenizer, processes: int) -> int:
    import datasets

    def tokenize(row: dict) -> dict:
        ids, labels = [], []
        for turn in row["texts"]:
            prompt = tokenizer(turn["user"], add_special_tokens=False).input_ids
            answer = tokenizer(turn["assistant"], add_special_tokens=False).input_ids
            ids += prompt + answer
            labels += [-100] * len(prompt) + answer
        return {"input_ids": ids, "labels": labels}

    loaded = datasets.load_dataset(
        "parquet", data_files=str(file), cache_dir=str(folder / "hf"), split="train"
    )
    done = loaded.map(
        tokenize, remove_columns=["texts"], num_proc=processes
    )  # pictures stay bytes: nothing names them as pictures
    return len(done)


def run(start: str, args: argparse.Namespace, folder: Path) -> dict[str, float] | None:
    """Run ``write_rows`` or ``measure`` in a process of its own and return what it prints."""
    command = [sys.executable, __file__, "--start", start, "--folder", str(folder)]
    command += ["--rows", str(args.rows), "--num-proc", str(args.num_proc)]
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "DPA_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures, prints a table with ratios and writes the figures as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows to generate")
    parser.add_argument("--num-proc", type=int, default=1, help="processes that tokenise")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--start", choices=["data", *_KINDS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start == "data":
        print(json.dumps(write_rows(args.folder, args.rows)))
        return
    if args.start:
        print(json.dumps(measure(args.start, args.folder, args.num_proc)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("data", args, folder)
        results = {kind: run(kind, args, folder) for kind in _KINDS}
    theirs = results[_KINDS[0]]["seconds"]
    print(f"{args.rows} rows, {args.num_proc} process(es), {len(os.sched_getaffinity(0))} cores")
    print(f"{'':<20}{'s':>8}{'rows/s':>10}{'MB after':>10}{'MB peak':>10}{'theirs / this':>15}")
    for kind, found in results.items():
        print(
            f"{kind:<20}{found['seconds']:>8.1f}{found['rows'] / found['seconds']:>10.0f}"
            f"{found['rss_mb']:>10.0f}{found['peak_mb']:>10.0f}{theirs / found['seconds']:>15.1f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"rows": args.rows, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
