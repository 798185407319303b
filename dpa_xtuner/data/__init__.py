"""Data: reading, tokenising once, batching, checking."""

from dpa_xtuner.data.check import DataReport, check_dataset
from dpa_xtuner.data.collate import collate
from dpa_xtuner.data.dataset import DPADataset
from dpa_xtuner.data.formats import read_records
from dpa_xtuner.data.problems import Problem
from dpa_xtuner.data.records import Record
from dpa_xtuner.data.sampler import GroupedSampler
