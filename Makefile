# make test   run all tests        make demo   run the demo        make check   style and types of the code
# Each sets up $(VENV) first; the second run finds it done.
#
# Override on the command line:
#   make test PYTHON=python3.12
#   make test TORCH="torch==2.13.0 --index-url <the index that pytorch.org names for your machine>"
#     On Linux the default index's torch brings the CUDA libraries (gigabytes); the tests need a CPU build only.
#     Not used where $(VENV) already has a torch.
#   make demo ARGS="--help"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

PY := $(VENV)/bin/python
# --no-input: CI has no terminal, and a question would hang.
PIP := $(PY) -m pip --disable-pip-version-check --no-input

.PHONY: test demo check clean
.DELETE_ON_ERROR:

test: $(VENV)/.ready-test
	$(PY) -m pytest -q $(ARGS)

demo: $(VENV)/.ready
	$(VENV)/bin/quantpress demo $(ARGS)

check: $(VENV)/.ready-check
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(PY) -m mypy

clean:
	rm -rf build dist *.egg-info demo_out .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f $(VENV)/.ready $(VENV)/.ready-test $(VENV)/.ready-check
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# An existing $(VENV) with a pip is used as it is; one that an interrupted `python -m venv` left half made is completed.
$(VENV)/.ready: pyproject.toml
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  command -v $(PYTHON) >/dev/null 2>&1 || { \
	    echo "'$(PYTHON)' not found. Install Python 3.10 or newer (sudo apt install python3 python3-venv), or name yours: make PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "'$(PYTHON)' is $$($(PYTHON) --version 2>&1); QuantPress needs 3.10 or newer. Name a newer one: make PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments: its venv module is missing. Install it (sudo apt install python3-venv), then run make again." >&2; exit 1; }; \
	  echo "Making $(VENV) ..."; \
	  $(PYTHON) -m venv $(VENV) || exit 1; \
	fi
	@$(PY) -c 'import torch' 2>/dev/null || { echo "Installing $(TORCH) ..."; $(PIP) install -q $(TORCH); }
	@echo "Installing QuantPress into $(VENV) ..."
	@$(PIP) install -q -e .
	@touch $@

# --no-deps: triton and bitsandbytes must not choose another torch. bitsandbytes is an oracle for the NF4 and FP4 tests only.
$(VENV)/.ready-test: $(VENV)/.ready
	@echo "Installing what the tests need ..."
	@$(PIP) install -q -e ".[test]"
	@if [ "$$(uname -s)" = Linux ]; then $(PIP) install -q --no-deps triton; fi
	@$(PIP) install -q --no-deps bitsandbytes
	@touch $@

$(VENV)/.ready-check: $(VENV)/.ready
	@echo "Installing what the checks need ..."
	@$(PIP) install -q -e ".[check]"
	@touch $@
