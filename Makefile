# Each target first makes .venv, or brings it up to date with pyproject.toml and constraints.txt.
# Only Python 3.11 or later and pip are needed.

PYTHON ?= python3
# Test processes. Each keeps to one thread, so that together they fill the cores.
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.stamp
NEIGHBOURS := .venv-neighbours/.stamp

# The weights and texts are in installed packages: nothing is fetched at run time.
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench bench-gpu bench-onnx dispatch healthy hunt kinds architectures attribution fuzz kill clean

help: ## Say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: $(STAMP) ## Convert a real sentence encoder to FP16 and judge the result
	$(BIN)/amp-convert examples/minilm.py
	@echo "The report is in reports/minilm/: open report.html there, or read report.md."

test: $(STAMP) ## Run the test suite, but for the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow"

test-slow: $(STAMP) ## Run the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slow

lint: $(STAMP) ## Check style, types and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(STAMP) ## Print the speed and memory figures, side by side
	$(BIN)/python -m tests.benchmarks.bench
	$(BIN)/python -m tests.benchmarks.speed --device cpu

# On a machine with a GPU and PyTorch for it; PYTHON names the interpreter.
bench-gpu: ## Print the speed of each arm on one GPU; needs PyTorch with CUDA, and transformers
	$(PYTHON) -m tests.benchmarks.speed --device cuda --dtype float16 --full --turns 25

dispatch: $(STAMP) ## Count the kernel calls and bytes of each arm, on every model of the tests
	$(BIN)/python -m tests.benchmarks.dispatch

healthy: $(STAMP) ## Judge models with nothing wrong, trained on real data: they must pass
	$(BIN)/python -m tests.benchmarks.healthy

hunt: $(STAMP) ## Plant faults in converted models: none may pass
	$(BIN)/python -m tests.benchmarks.hunt

kinds: $(STAMP) ## Judge models of many kinds, and write the table in docs/models.md
	$(BIN)/python -m tests.benchmarks.kinds --markdown docs/models.md

architectures: $(STAMP) ## Try public architectures, and write the table in docs/architectures.md
	$(BIN)/python -m tests.benchmarks.architectures --markdown docs/architectures.md

attribution: $(STAMP) ## Hold the error budget against nodes tried alone, and write docs/attribution.md
	$(BIN)/python -m tests.benchmarks.attribution --markdown docs/attribution.md

fuzz: $(STAMP) ## Feed mutated files to the readers: each is read, or refused in one line
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.fuzz

kill: $(STAMP) ## Kill the command at random moments: nothing may be lost or left over
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.kill

bench-onnx: $(STAMP) $(NEIGHBOURS) ## Hold FP16 ONNX files against those of other converters
	$(BIN)/python -m tests.benchmarks.bench_onnx .venv-neighbours/bin/python

clean: ## Remove .venv, caches and reports; the baselines stay
	rm -rf .venv .venv-neighbours .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find amp_convert examples tests -name __pycache__ -prune -exec rm -rf {} +
	test ! -d reports || find reports -mindepth 1 -maxdepth 1 ! -name baselines -exec rm -rf {} +

# The stamp is written last, so that an install that was cut short is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; name one with PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,examples]'
	@touch $@

# Where ModelOpt cannot be installed, the other converter still can; it is tried again next time.
$(NEIGHBOURS): tests/benchmarks/neighbours.txt | $(STAMP)
	$(BIN)/python -m venv --clear .venv-neighbours
	if .venv-neighbours/bin/python -m pip install -q -r $<; then touch $@; else \
		echo "NVIDIA ModelOpt could not be installed; going on without it." && \
		.venv-neighbours/bin/python -m pip install -q onnx==1.21.0 onnxruntime==1.24.4 \
			$$(grep onnxconverter $<); fi
