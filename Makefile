# Fresh machine to finished run: `make train`. Pass overrides as `make train ARGS="optimizer=lion"`.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
ARGS   ?=
# SYSTEM_TORCH=1 uses the machine's own torch instead of installing one.
SYSTEM_TORCH ?=

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS  := pyproject.toml constraints.txt

.PHONY: train test test-slow faults lint install clean help

help:
	@echo "make train [ARGS=\"optimizer=lion\"]   install what a run needs and train the default model"
	@echo "make test                            install what the tests need and run them"
	@echo "make test-slow                       the thorough tier, minutes each"
	@echo "make faults                          every fault a run must survive, injected: one line each"
	@echo "make lint                            ruff and the import floors"
	@echo "make clean                           remove $(VENV)"

train: $(VENV)/run.stamp
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m slow

faults: $(VENV)/test.stamp
	$(BIN)/python -m pytest --faults tests/faults tests

lint: $(VENV)/test.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

install: $(VENV)/run.stamp

clean:
	rm -rf $(VENV)

$(VENV)/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "lightning_opt needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: install it (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV)
	@touch $@

$(VENV)/torch.stamp: $(VENV)/venv.stamp
	$(if $(SYSTEM_TORCH),$(BIN)/python -c 'import torch; print("torch", torch.__version__)',$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)')
	@touch $@

$(VENV)/%.stamp: $(INPUTS) | $(VENV)/torch.stamp
	$(INSTALL) -e '.[$*]'
	@touch $@
