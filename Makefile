PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint bench clean
install: $(VENV)/.installed

# Rebuilt when a dependency changes; the stamp is written last, so a broken install is tried again.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"anoseg_jax needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	@# Without setuptools' note on editable installs.
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

demo: install
	$(BIN)/python launch.py --config=configs/synthetic.py --workdir=runs/demo

test: install
	@# Tests of one file share what they compile.
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	$(BIN)/python benchmarks/augmentation.py
	$(BIN)/python benchmarks/metrics.py

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache build *.egg-info
