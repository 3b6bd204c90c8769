# make setup   virtual environment in .venv with everything (nothing to do when it is up to date)
# make demo    a small training run that shows the point of the package
# make test    the tests
# make coverage   docs/coverage.md: every family of transformers and timm (an hour or two; goes on where it stopped)
# make bench-gpu  what needs a GPU: its tests, and what a step costs there
# make check   lint, types (on an installed copy), and the direction of the imports
# make clean   remove what the targets above made, except .venv

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALLED := build/installed
SOURCES := modnorm_fx passes models_zoo tests $(wildcard benchmarks)

.PHONY: setup demo test coverage bench-gpu check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m modnorm_fx.models_zoo.demo

# One thread a worker: with more, small tensor work on few cores gets slower, not faster.
test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# It fails if a family does; the page is written all the same.
coverage: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/modnorm-fx coverage --jobs 2 $(ARGS)

bench-gpu: setup
	$(BIN)/python -m pytest tests/test_graph.py tests/test_codegen.py tests/test_kernels_gpu.py \
		tests/test_kernels_gpu_adamw.py tests/test_fused_triton.py
	$(BIN)/python benchmarks/step.py --device cuda

# The copy is made from scratch: a stale build/lib would bring deleted modules back.
check: setup
	$(BIN)/ruff check $(SOURCES)
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target $(INSTALLED) .
	cd $(INSTALLED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p modnorm_fx
	$(BIN)/python -m pytest -q tests/test_layers.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find modnorm_fx passes models_zoo tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
