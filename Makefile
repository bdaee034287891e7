# Everything a fresh clone needs: `make demo` and `make test` do their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-engines lint format install models clean help

help:            ## Show what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: models     ## Write a reply with the demo pair: two small models with different tokenizers
	$(BIN)/mixlm generate "Why is the sky blue?" --max-tokens 120

test: models     ## Run every test
	$(BIN)/python -m pytest

test-engines: models  ## Run the engines' tests with real models in llama.cpp, and mixlm check there (minutes)
	$(BIN)/python -m pytest tests/engines tests/test_failure.py -m "engines or not engines"
	$(BIN)/mixlm check --engine llamacpp --samples 1000

lint: $(VENV)/.installed  ## Check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## Put the sources into the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/.installed  ## Set up .venv with the pinned versions

models: $(VENV)/.installed  ## Fetch and convert the demo pair, once
	$(BIN)/mixlm models get demo

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mixlm needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[hf,llamacpp,remote,peft,eval,paper,serve,otel,dev]'
	@touch $@

clean:           ## Remove the virtual environment and what tools left
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
