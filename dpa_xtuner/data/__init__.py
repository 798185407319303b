"""LLaVA-format data: reading, tokenising once, batching, checking."""

from dpa_xtuner.data.check import Report, check_dataset
from dpa_xtuner.data.collate import collate
from dpa_xtuner.data.dataset import DPADataset, Skipped
from dpa_xtuner.data.problems import Problem
from dpa_xtuner.data.records import Record, read_records
from dpa_xtuner.data.sampler import GroupedSampler
from dpa_xtuner.data.store import TokenStore, open_store
from dpa_xtuner.data.templates import SampleFormat, resolve_template

__all__ = [
    "DPADataset",
    "GroupedSampler",
    "Problem",
    "Record",
    "Report",
    "SampleFormat",
    "Skipped",
    "TokenStore",
    "check_dataset",
    "collate",
    "open_store",
    "read_records",
    "resolve_template",
]
