# Each target sets up what it needs in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTED := $(VENV)/.tested
SOURCES := $(shell find retro index_builder eval tests examples README.md pyproject.toml constraints.txt -type f -not -name '*.pyc')
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: setup demo test check bench clean

setup: $(STAMP)

# torch comes first and by itself: without an NVIDIA GPU as its CPU build, which has no CUDA packages. Where pip's indexes do
# not offer that build under its own name, uv knows where it lies.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	@if command -v nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)"; \
	else \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)+cpu" 2>/dev/null || { \
			$(BIN)/python -m pip install --quiet --disable-pip-version-check uv && \
			$(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; }; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	@touch $@

demo: setup
	$(BIN)/retro demo

# A file's tests run in one process, so that what they share is made once; those that run the quick unit tests come last.
test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
	@touch $(TESTED)

# Tests, too: the quick ones, where files have changed since tests passed.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/retro eval readme README.md benchmarks/results/report --check
	@$(MAKE) --no-print-directory $(TESTED)

$(TESTED): $(STAMP) $(SOURCES)
	$(BIN)/python -m pytest -n auto -m "not slow" tests/unit tests/golden
	@touch $@

bench: setup
	$(BIN)/python benchmarks/squad_recall.py

clean:
	rm -rf $(VENV) demo.index demo.data demo.tok demo.model
