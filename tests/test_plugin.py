"""What a config's custom_imports brings, and what importing the package alone does not."""

import subprocess
import sys

import pytest
from mmengine.utils import get_object_from_string

from dpa_xtuner.families.internlm.llm import InternLM2ForCausalLM, InternLM3ForCausalLM
from dpa_xtuner.families.internlm.tokenizer import InternLMTokenizer


def run(script: str, *arguments) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# As `xtuner train` does: XTuner is imported, then the config is read.
TRAIN = """\
import sys, xtuner.tools.train
from mmengine.config import Config
Config.fromfile(sys.argv[1])
from mmengine.registry import HOOKS, LOOPS, MODELS
from dpa_xtuner.registry import RUNNERS
known = {name for each in (HOOKS, LOOPS, MODELS, RUNNERS) for name in each.module_dict}
print('found', sorted(set(sys.argv[2:]) & known))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpa_xtuner.plugin", "dpa_xtuner"])
def test_a_config_registers_the_classes_by_the_new_name_and_the_old(name, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(f"custom_imports = dict(imports=[{name!r}], allow_failed_imports=False)\n")
    names = ["DPALLaVAModel", "DPATrainLoop", "FlexibleRunner", "HandOverHook", "ProxyLLMHook"]
    assert f"found {names}" in run(TRAIN, config, *names).splitlines()


def test_the_package_alone_imports_nothing_heavy():
    script = "import sys, dpa_xtuner; print({'mmengine', 'torch', 'xtuner'} & set(sys.modules))"
    assert run(script) == "set()\n"


@pytest.mark.parametrize(
    ("former", "owner"),
    [
        ("model.internlm2.InternLM2ForCausalLM", InternLM2ForCausalLM),
        ("model.internlm3.InternLM3ForCausalLM", InternLM3ForCausalLM),
        ("families.tokenizer.InternLMTokenizer", InternLMTokenizer),
    ],
)
def test_a_class_that_moved_is_found_where_configs_name_it(former, owner):
    assert get_object_from_string(f"dpa_xtuner.{former}") is owner
