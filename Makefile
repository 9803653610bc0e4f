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

demo: install
	$(BIN)/python launch.py --config=configs/synthetic.py --workdir=runs/demo

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
