PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_VENV := .venv-torch
TORCH_BIN := $(TORCH_VENV)/bin

.PHONY: install demo test install-torch test-torch lint docs bench clean
install: $(VENV)/.installed

# pip is silent for minutes: a line every ten seconds.
PROGRESS = started=$$(date +%s); \
	(while sleep 10 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do \
		echo "  installing: $$(($$(date +%s) - started)) s, $$(du -sm $(@D) | cut -f1) MB in $(@D)"; \
	done) & progress=$$!; trap "kill $$progress" EXIT;

# Rebuilt when a dependency changes; the stamp is written last, so a broken install is tried again.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"anoseg_jax needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing what the program needs (one to three minutes, 2.7 GB)"
	@$(PROGRESS) $(BIN)/pip install --quiet --upgrade "pip>=24" && \
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@# PYTHONWARNINGS: without setuptools' note on editable installs.
	@touch $@

# Beside that, what tests and checks need.
$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(PROGRESS) PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

DEMO := runs/demo
DEMO_CACHE := $(CURDIR)/runs/cache
# Options of the training, for tests.
DEMO_FLAGS :=
define DEMO_TEXT

From 64 photographs of good parts each, without one defect, the program learned a perforated sheet and
a blister pack; then it judged 36 test photographs and 6 new ones of each.

Open this page:  $(abspath $(DEMO))/report.html
The new ones:    $(DEMO)/predictions/sheet/report.html, $(DEMO)/predictions/blister/report.html

Your own photographs: put those of good parts into DATA/bolt/train/good/. To check them, train on them
and judge new ones:
  $(BIN)/python launch.py --config=configs/folder.py:bolt:cpu --config.data_dir=DATA --mode=check
  $(BIN)/python launch.py --config=configs/folder.py:bolt:cpu --config.data_dir=DATA --workdir=runs/mine
  $(BIN)/python launch.py --mode=predict --workdir=runs/mine/bolt --out=runs/mine/new PHOTOGRAPHS
endef
export DEMO_TEXT

# All that the demo writes, the caches of libraries included, lies in runs/.
demo: export JAX_COMPILATION_CACHE_DIR = $(DEMO_CACHE)/jax
demo: export MPLCONFIGDIR = $(DEMO_CACHE)/matplotlib
demo: export KERAS_HOME = $(DEMO_CACHE)/keras
demo: install
	$(BIN)/python -m data.synthetic_ad.drawing --categories=sheet,blister \
		--out=$(DEMO)/photographs --new=$(DEMO)/new
	$(BIN)/python launch.py --config=configs/synthetic.py --workdir=$(DEMO) \
		--config.dataset=folder --config.data_dir=$(DEMO)/photographs \
		--config.compilation_cache=$(DEMO_CACHE)/jax $(DEMO_FLAGS)
	$(BIN)/python launch.py --mode=predict --workdir=$(DEMO)/sheet \
		--out=$(DEMO)/predictions/sheet $(DEMO)/new/sheet
	$(BIN)/python launch.py --mode=predict --workdir=$(DEMO)/blister \
		--out=$(DEMO)/predictions/blister $(DEMO)/new/blister
	@echo "$$DEMO_TEXT"

test: $(VENV)/.installed-test
	@# Tests of one file share what they compile.
	$(BIN)/python -m pytest -n 2 --dist loadfile

install-torch: $(TORCH_VENV)/.installed

# PyTorch in an environment of its own, which also sees the packages of the first one.
$(TORCH_VENV)/.installed: $(VENV)/.installed
	$(BIN)/python -m venv --clear $(TORCH_VENV)
	@# A .pth file adds its lines to the module search path.
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(TORCH_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@echo "installing PyTorch"
	@$(PROGRESS) $(TORCH_BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(TORCH_BIN)/python -c 'import torch, jax'
	@touch $@

test-torch: install-torch $(VENV)/.installed-test
	$(TORCH_BIN)/python -m pytest tests/interop

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The site of docs/, in build/site.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "installing what the site needs"
	@$(PROGRESS) PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

bench: install
	$(BIN)/python benchmarks/augmentation.py
	$(BIN)/python benchmarks/metrics.py

clean:
	rm -rf $(VENV) $(TORCH_VENV) runs .pytest_cache .ruff_cache build *.egg-info
