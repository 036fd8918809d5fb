# Two commands on a fresh machine: `make demo` and `make test`. `make` alone lists the rest.
# Every path is relative, so a clone may live in a folder with spaces in its name.

SHELL = /bin/bash
# A Python 3.11 or newer to build .venv with; empty means: look for one.
PYTHON =
# Address of an index with PyTorch's CPU builds, for a Linux machine without an NVIDIA card.
TORCH_INDEX =
# ALLOW_CUDA=1 installs the CUDA libraries even where no NVIDIA card is seen.
ALLOW_CUDA =

# Options of the benchmarks' scripts: make bench BENCH_SERVERS="--clients 1 16 --requests 16"
BENCH_ENGINE =
BENCH_SERVERS =
BENCH_GPU =

PROMPT = a red circle to the left of a blue square on a yellow background
PY = .venv/bin/python
INSTALLED = .venv/installed
TROUBLESHOOTING = $(PY) -c 'import sys; from sdfleet.doctor.page import page; sys.stdout.write(page())'
# The page's own words above the table stay.
SETTINGS_PAGE = sed '/^| in sdfleet.toml/,$$d' docs/settings.md && \
  $(PY) -c 'import sys; from sdfleet.settings import table; sys.stdout.write(table())'
CLI_REFERENCE = $(PY) -m typer sdfleet.cli.main utils docs --name sdfleet
# A file's tests on one core each, several files at once; the slow ones, which start processes and measure, one by one.
PYTEST_BESIDE = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PIP_INSTALL = $(PY) -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## draw a picture with the built-in model: no download, no account, no GPU
	@start=$$(date +%s); \
	$(PY) -m sdfleet generate "$(PROMPT)" --seed 7 -o demo.png && \
	echo "demo.png is in $$PWD ($$(( $$(date +%s) - start )) s, program start included)"

test: $(INSTALLED) static wheel ## everything CI runs: check, the slow tests, the built wheel
	@$(PYTEST_BESIDE) -m "not slow"
	@$(PY) -m pytest -m "slow and not thorough"

check: $(INSTALLED) static ## before a commit: format, lint, types, layers, generated docs, default tests
	@$(PYTEST_BESIDE) -m "not slow"

thorough: $(INSTALLED) ## what `make test` tries a few times, many times: before a release
	@$(PY) -m pytest -m thorough

bench: $(INSTALLED) ## this machine: ours against plain diffusers, and our server against two others
	@$(PY) benchmarks/engine_vs_diffusers.py $(BENCH_ENGINE)
	@$(PY) benchmarks/serve_bench.py $(BENCH_SERVERS)

bench-gpu: $(INSTALLED) ## an NVIDIA card: published models on random weights, against diffusers on the same card
	@$(PY) benchmarks/gpu.py $(BENCH_GPU)

starter: $(INSTALLED) ## train the built-in model again, from nothing (hours on a CPU)
	@$(PY) -m sdfleet train starter

docs: $(INSTALLED) ## write docs/cli.md, settings.md and troubleshooting.md again, from the code
	@$(CLI_REFERENCE) > docs/cli.md
	@mkdir -p build; { $(SETTINGS_PAGE); } > build/settings.md && mv build/settings.md docs/settings.md
	@$(TROUBLESHOOTING) > docs/troubleshooting.md

clean: ## remove .venv, caches, build folders and the demo picture; finished pictures stay
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis demo*.png
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ------------------------------------------------------------------------------------------------ what the above use

# Nothing here starts the engine; together about a minute with cold caches.
static: $(INSTALLED)
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy
	@.venv/bin/lint-imports --no-logo
	@$(CLI_REFERENCE) | diff -u docs/cli.md - || { echo "docs/cli.md is not what the commands say: make docs"; exit 1; }
	@$(PY) -m pip check
	@find src tests -name '*.py' -exec wc -l {} + | \
	  awk '$$2 != "total" && $$1 > 500 { print $$2 " has " $$1 " lines; more than 500 is a sign of a second noun" }'

# The wheel is what users get: it must draw a picture without this folder.
wheel: $(INSTALLED)
	@set -eu; rm -rf build/wheel; mkdir -p build/wheel; \
	$(PY) -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation -w build/wheel . ; \
	$(PIP_INSTALL) --no-deps --target build/wheel/site build/wheel/*.whl; \
	cd build/wheel; export PYTHONPATH=site; \
	"$$OLDPWD/$(PY)" -c 'import sdfleet; assert "site/sdfleet" in sdfleet.__file__'; \
	"$$OLDPWD/$(PY)" -m sdfleet generate "$(PROMPT)" --steps 2 --seed 7 -o wheel.png >/dev/null; \
	test -s wheel.png; du -h ./*.whl

$(INSTALLED): pyproject.toml constraints.txt
	@set -eu; \
	is_new_enough='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(PY) -c "$$is_new_enough" 2>/dev/null; then \
	  found=""; \
	  for name in "$(PYTHON)" python3 python3.14 python3.13 python3.12 python3.11; do \
	    if [ -n "$$name" ] && "$$name" -c "$$is_new_enough" 2>/dev/null; then found="$$name"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "No Python 3.11 or newer was found. Install one, or name it: make demo PYTHON=/path/to/python3"; exit 1; \
	  fi; \
	  if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$found cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; \
	  fi; \
	  echo "Making .venv with $$("$$found" --version)."; \
	  rm -rf .venv; "$$found" -m venv .venv; \
	fi; \
	index=(); if [ -n "$(TORCH_INDEX)" ]; then index=(--extra-index-url "$(TORCH_INDEX)"); fi; \
	if [ -z "$(ALLOW_CUDA)" ] && ! ls /dev/nvidia* /dev/dxg /dev/nvmap >/dev/null 2>&1; then \
	  $(PIP_INSTALL) "$${index[@]}" --dry-run --ignore-installed --report .venv/torch.json torch; \
	  if grep -Eq '"name": "nvidia-' .venv/torch.json; then \
	    echo "torch would bring several GB of CUDA libraries, and no NVIDIA card was found here. Either"; \
	    echo "  take the CPU build:  make $(MAKECMDGOALS) TORCH_INDEX=<the CPU address from PyTorch's install page>"; \
	    echo "  or take them anyway: make $(MAKECMDGOALS) ALLOW_CUDA=1"; \
	    exit 1; \
	  fi; \
	fi; \
	echo "Installing sdfleet and what it needs into .venv: about 1.4 GB, some minutes the first time."; \
	start=$$(date +%s); \
	$(PIP_INSTALL) "$${index[@]}" -e '.[dev]'; \
	touch $(INSTALLED); \
	echo "Installed in $$(( $$(date +%s) - start )) s."

.PHONY: help demo test check thorough bench bench-gpu starter docs clean static wheel
