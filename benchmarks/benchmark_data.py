"""Measure the first pass over data, side by side with stock XTuner or with ``datasets.map``.

    python benchmarks/benchmark_data.py llava --records 558000 --other-records 50000 100000
    python benchmarks/benchmark_data.py parquet --records 100000

``llava``: caption records of 20 to 60 words, which stock XTuner's ``LLaVADataset`` reads too. It
tokenises in 32 processes whatever the machine has; ``--other-proc`` gives it another number.
``parquet``: rows of The Cauldron's shape with a small JPEG inside and two questions each.
``datasets.map`` tokenises questions and answers and keeps labels; it neither opens pictures nor
lays a template around the text.

Each start runs in a process of its own, on the same generated data, with the same tokenizer. Of
several ``--num-proc``, the stores are compared byte by byte.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WORDS = 2000  # different words in the generated texts
_PICTURES = 50  # different pictures
_GROUP = 100  # rows of a row group, as datasets writes pictures
_TEMPLATE = {"INSTRUCTION": "USER: {input} ASSISTANT: ", "SEP": "\n"}
_FILES = {"llava": "data.json", "parquet": "data.parquet"}
_OTHERS = {"llava": "stock XTuner", "parquet": "datasets.map"}
_COLUMNS = {
    "processes": ("processes", "{:.0f}"),
    "records": ("records", "{:.0f}"),
    "seconds": ("start, s", "{:.1f}"),
    "rate": ("records/s", "{:.0f}"),
    "rss_mb": ("memory after, MB", "{:.0f}"),
    "peak_mb": ("peak memory, MB", "{:.0f}"),
}


def write_data(kind: str, folder: Path, records: int) -> None:
    """Write the data file, a picture that captions share, and a small byte-level BPE tokenizer.

    Args:
        kind: "llava" or "parquet".
        folder: where to.
        records: their number.
    """
    import numpy as np
    from PIL import Image
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(_WORDS)]

    def text(least: int, most: int) -> str:
        return " ".join(words[i] for i in rng.integers(0, _WORDS, rng.integers(least, most)))

    bpe = ByteLevelBPETokenizer()
    sample = [text(20, 60) for _ in range(2000)]
    bpe.train_from_iterator(sample, vocab_size=4000, special_tokens=["<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    Image.new("RGB", (400, 300), "teal").save(folder / "image.png")
    if kind == "llava":
        _write_json(folder / _FILES[kind], records, text)
    else:
        noise = rng.integers(0, 256, (_PICTURES, 96, 128, 3), np.uint8)
        _write_parquet(folder / _FILES[kind], records, text, noise)


def _write_json(path: Path, records: int, text: Callable[[int, int], str]) -> None:
    human = {"from": "human", "value": "<image>\nDescribe the picture."}
    with path.open("w") as file:
        for i in range(records):
            turns = [human, {"from": "gpt", "value": text(20, 60)}]
            record = {"id": f"{i:09d}", "image": "image.png", "conversations": turns}
            file.write(("[" if i == 0 else ",\n") + json.dumps(record))
        file.write("]")


def _write_parquet(path: Path, rows: int, text: Callable[[int, int], str], noise: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    pictures = []
    for pixels in noise:
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "JPEG")
        pictures.append({"bytes": content.getvalue(), "path": None})
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("user", pa.string()), ("assistant", pa.string())])
    schema = pa.schema([("images", pa.list_(picture)), ("texts", pa.list_(turn))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, _GROUP):
            numbers = range(start, min(start + _GROUP, rows))
            texts = [
                [{"user": text(5, 15), "assistant": text(10, 40)} for _ in range(2)]
                for _ in numbers
            ]
            images = [[pictures[i % _PICTURES]] for i in numbers]
            writer.write_table(
                pa.table({"images": images, "texts": texts}, schema=schema), row_group_size=_GROUP
            )


def measure(start: str, kind: str, folder: Path, processes: int) -> dict[str, Any]:
    """Start one data set in this process.

    Args:
        start: "ours" or "other".
        kind: "llava" or "parquet".
        folder: from :func:`write_data`.
        processes: that tokenise.

    Returns:
        Its records, seconds until its lengths are known, memory of this process beyond the imports
        in MB (as it is then, and the peak), and of ours a hash of the store.
    """
    import psutil
    from transformers import AutoTokenizer, CLIPImageProcessor

    from dpa_xtuner.data import DPADataset  # imports XTuner and datasets too

    processor, tokenizer = CLIPImageProcessor(), AutoTokenizer.from_pretrained(folder)
    file = folder / _FILES[kind]
    ours = functools.partial(
        DPADataset, file, str(folder), tokenizer, processor, image_tokens=576, num_proc=processes
    )
    imports = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    store = ""
    if start == "other":
        other = _stock if kind == "llava" else _map
        records = other(file, tokenizer, processor, processes)
    else:
        dataset = (
            ours(sample_format="caption")
            if kind == "llava"
            else ours(sample_format="chat", prompt_template=_TEMPLATE)
        )
        records = len(dataset.modality_length)
        store = str(dataset.stores[0].folder)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "processes": processes,
        "records": records,
        "seconds": seconds,
        "rate": records / seconds,
        "rss_mb": (psutil.Process().memory_info().rss - imports) / 1e6,
        "peak_mb": (peak - imports) / 1e6,
        "store": store and _hash(Path(store)),
    }


def _stock(file: Path, tokenizer: Any, processor: Any, processes: int) -> int:
    from xtuner.dataset import LLaVADataset, llava
    from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    llava.process_hf_dataset = functools.partial(llava.process_hf_dataset, map_num_proc=processes)
    dataset = LLaVADataset(
        data_path=str(file),
        image_folder=str(file.parent),
        tokenizer={
            "type": type(tokenizer).from_pretrained,
            "pretrained_model_name_or_path": str(file.parent),
        },
        image_processor=processor,
        dataset_map_fn=llava_map_fn,
        template_map_fn={"type": template_map_fn_factory, "template": PROMPT_TEMPLATE.vicuna},
        max_length=2048 - 576,
        pad_image_to_square=True,
    )
    return len(dataset.modality_length)


def _map(file: Path, tokenizer: Any, processor: Any, processes: int) -> int:
    import datasets

    def tokenize(row: dict) -> dict:
        ids, labels = [], []
        for turn in row["texts"]:
            prompt = tokenizer(turn["user"], add_special_tokens=False).input_ids
            answer = tokenizer(turn["assistant"], add_special_tokens=False).input_ids
            ids += prompt + answer
            labels += [-100] * len(prompt) + answer
        return {"input_ids": ids, "labels": labels}

    loaded = datasets.load_dataset("parquet", data_files=str(file), split="train")
    # Pictures stay bytes: nothing names them as pictures.
    return len(loaded.map(tokenize, remove_columns=["texts"], num_proc=processes))


def _hash(store: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(store.iterdir()):
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()


def run(*arguments: Any, cache: Path) -> Any:
    """Run :func:`write_data` or :func:`measure` in its own process and return what it prints.

    This process stays small, since its peak memory would count as the child's.
    """
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "DPA_CACHE": str(cache),
        "HF_HOME": str(cache),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, __file__, "--start", *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print a table, and write the figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=list(_FILES))
    parser.add_argument("--records", type=int, default=100_000, help="records that ours reads")
    parser.add_argument("--num-proc", type=int, nargs="+", default=[1], help="its processes")
    parser.add_argument("--other-records", type=int, nargs="*", help="of the other; default: all")
    parser.add_argument("--other-proc", type=int, nargs="+", help="default: 32 in XTuner, else 1")
    parser.add_argument("--folder", type=Path, help="to keep the data in, for another call")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    others = [args.records] if args.other_records is None else args.other_records
    other_proc = args.other_proc or [32 if args.kind == "llava" else 1]
    results = {}
    with tempfile.TemporaryDirectory() as name:
        base = args.folder or Path(name)

        def start(title: str, which: str, records: int, processes: int, cache: Path) -> None:
            folder = base / f"{args.kind}-{records}"
            if not folder.exists():
                folder.mkdir(parents=True)
                run("data", args.kind, folder, records, cache=cache)
            results[title] = run(which, args.kind, folder, processes, cache=cache)

        for records in others:
            for processes in other_proc:
                cache = Path(name, "other")
                title = f"{_OTHERS[args.kind]}, {records}, {processes}"
                start(title, "other", records, processes, cache)
                shutil.rmtree(cache)
        for processes in args.num_proc:
            cache = Path(name, f"ours-{processes}")
            start(f"first start, {processes}", "ours", args.records, processes, cache)
        if args.num_proc:
            start("second start", "ours", args.records, processes, cache)
    _report(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def _report(results: dict[str, dict]) -> None:
    print(f"{len(os.sched_getaffinity(0))} core(s); memory of the main process beyond the imports")
    print(" " * 32 + "".join(f"{title:>18}" for title, _ in _COLUMNS.values()))
    for title, found in results.items():
        cells = [form.format(found[key]) for key, (_, form) in _COLUMNS.items()]
        print(f"{title:<32}" + "".join(f"{cell:>18}" for cell in cells))
    stores = {found["store"] for found in results.values() if found["store"]}
    if len(results) > 1 and stores:
        print(f"stores: {'equal' if len(stores) == 1 else 'DIFFERENT'}")


def child(what: str, kind: str, folder: str, number: str) -> None:
    """Do what :func:`run` asks for, and print the result."""
    if what == "data":
        print(json.dumps(write_data(kind, Path(folder), int(number))))
    else:
        print(json.dumps(measure(what, kind, Path(folder), int(number))))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--start"] else main()
