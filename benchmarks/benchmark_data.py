"""Measure the start-up of ``DPADataset`` against stock XTuner's ``LLaVADataset``, side by side.

Each start runs in its own process, on the same generated caption records, with the same
tokenizer and image processor:

    python benchmarks/benchmark_data.py --records 558000 --stock-records 50000

Stock XTuner takes about 12 minutes and 13 GB for 558,000 records, at every start: give it a share.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_WORDS = 2000  # different words in the generated captions
_ITEMS = 500  # samples read one after the other for the items/s column
_COLUMNS = {
    "records": "records",
    "start_s": "start, s",
    "records_per_s": "records/s",
    "rss_mb": "memory after, MB",
    "peak_mb": "peak memory, MB",
    "items_per_s": "items/s",
}


def write_data(folder: Path, records: int) -> None:
    """Write caption records, one image that all share, and a small byte-level BPE tokenizer.

    Args:
        folder: where to.
        records: number of caption records, 20 to 60 words each.
    """
    import numpy as np
    from PIL import Image
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(_WORDS)]
    captions = [
        " ".join(words[i] for i in rng.integers(0, _WORDS, rng.integers(20, 60)))
        for _ in range(records)
    ]
    data = [
        {
            "id": f"{i:09d}",
            "image": "image.png",
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe the picture."},
                {"from": "gpt", "value": caption},
            ],
        }
        for i, caption in enumerate(captions)
    ]
    (folder / "data.json").write_text(json.dumps(data))
    Image.new("RGB", (400, 300), "teal").save(folder / "image.png")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(captions[:2000], vocab_size=4000, special_tokens=["<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def measure(which: str, folder: Path, tokenizer: str, processes: int) -> dict[str, float]:
    """Start one data set in this process.

    Args:
        which: "stock" or "ours".
        folder: from ``write_data``.
        tokenizer: folder of the tokenizer.
        processes: that tokenise, in ours.

    Returns:
        Its records, seconds to build it and its list of lengths, memory beyond the imports in MB
        (as it is then, and the peak), samples read per second.
    """
    import psutil
    from transformers import AutoTokenizer, CLIPImageProcessor
    from xtuner.dataset import LLaVADataset
    from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    from dpa_xtuner.data import DPADataset

    common = {
        "data_path": str(folder / "data.json"),
        "image_folder": str(folder),
        "tokenizer": {
            "type": AutoTokenizer.from_pretrained,
            "pretrained_model_name_or_path": tokenizer,
        },
        "image_processor": CLIPImageProcessor(),
        "pad_image_to_square": True,
    }
    imports = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    if which == "ours":
        dataset = DPADataset(
            **common, sample_format="caption", image_tokens=576, max_length=2048, num_proc=processes
        )
    else:
        dataset = LLaVADataset(
            **common,
            dataset_map_fn=llava_map_fn,
            template_map_fn={"type": template_map_fn_factory, "template": PROMPT_TEMPLATE.vicuna},
            max_length=2048 - 576,
        )
    lengths = dataset.modality_length
    started = time.perf_counter() - begin
    rss = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.perf_counter()
    items = min(_ITEMS, len(lengths))
    for i in range(items):
        dataset[i]
    return {
        "records": len(lengths),
        "start_s": started,
        "records_per_s": len(lengths) / started,
        "rss_mb": (rss - imports) / 1e6,
        "peak_mb": (peak - imports) / 1e6,
        "items_per_s": items / (time.perf_counter() - begin),
    }


def run(start: str, args: argparse.Namespace, folder: Path, records: int) -> dict[str, float]:
    """Run ``write_data`` or ``measure`` in its own process and return what it prints.

    This process stays small, since its peak memory would count as the child's.
    """
    command = [sys.executable, __file__, "--start", start, "--folder", str(folder)]
    command += ["--records", str(records), "--tokenizer", args.tokenizer or str(folder)]
    command += ["--num-proc", str(args.num_proc)]
    environment = {**os.environ, "DPA_CACHE": str(folder / "cache")}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print a table, and write the figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=50_000, help="caption records to generate")
    parser.add_argument("--stock-records", type=int, help="of them for stock; default: all")
    parser.add_argument("--num-proc", type=int, default=1, help="processes that tokenise, in ours")
    parser.add_argument("--tokenizer", help="tokenizer folder; a small one is trained by default")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--start", choices=["data", "stock", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start == "data":
        print(json.dumps(write_data(args.folder, args.records)))
        return
    if args.start:
        print(json.dumps(measure(args.start, args.folder, args.tokenizer, args.num_proc)))
        return
    results = {}
    for which, records in (("stock", args.stock_records or args.records), ("ours", args.records)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run("data", args, folder, records)
            for start in ("first start", "second start"):
                results[f"{which}, {start}"] = run(which, args, folder, records)
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, {args.num_proc} process(es) tokenise; memory beyond the imports")
    print(" " * 22 + "".join(f"{title:>18}" for title in _COLUMNS.values()))
    for title, result in results.items():
        print(f"{title:<22}" + "".join(f"{result[key]:>18.1f}" for key in _COLUMNS))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
