# Every target works on a fresh machine: it makes .venv and installs the project into it first. Torch comes from plain
# pip, so whatever wheel the machine's pip configuration prefers (a CPU build, say) is the one that is used.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests start dozens of processes, each of which would compile the Python of torch and transformers anew: ten seconds.
unexport PYTHONDONTWRITEBYTECODE
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow fuzz faults lint bench clean

demo: $(STAMP)            ## real weights, a LoRA trained on the spot, three compilers side by side (about 5 minutes)
	$(BIN)/python -m gawscompile.demo

# Two processes, as most tests keep one core busy: those of single parts, and those of the whole, which take about as
# long. Each starts with an Inductor cache of its own (tests/conftest.py).
PARTS := $(filter-out $(addprefix tests/,adapters/% banks/% debug/% distributed/% gpu/% observe/% serving/% watch/%),$(sort $(wildcard tests/*/test_*.py)))
WHOLE := $(filter-out $(PARTS),$(sort $(wildcard tests/*/test_*.py tests/test_*.py)))

test: $(STAMP)            ## the fast tests
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	$(BIN)/python -m pytest -m "not slow" --durations=15 $(PARTS) > "$$log" 2>&1 & parts=$$!; \
	$(BIN)/python -m pytest -m "not slow" --durations=15 $(WHOLE); whole=$$?; \
	wait $$parts; parts=$$?; cat "$$log"; exit $$((parts | whole))

test-slow: $(STAMP)       ## whole real models
	$(BIN)/python -m pytest -m slow

SECONDS ?= 60

fuzz: $(STAMP)            ## random programs beside eager and fp64, on all levels together for SECONDS=60
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.fuzz --seconds $(SECONDS)

faults: $(STAMP)          ## plants each fault of tests/faults.py, and says who notices
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.planted

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench: $(STAMP)           ## the runtime tables, into benchmarks/results
	$(BIN)/python -m benchmarks.runtime --dtype float32 bfloat16 --markdown benchmarks/results/runtime.md \
		--json benchmarks/results/runtime.json

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Bytecode is written when a module is first imported: most of torch's modules never are.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes, 2.5 GB"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'
	touch $@
