# Two commands set everything up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
PYTHON_GPU ?= $(PYTHON)
VENV := .venv
BIN := $(VENV)/bin
CORE := $(wildcard csrc/*) CMakeLists.txt setup.py
CPP_TESTS := $(wildcard tests/cpp/*)
# torch 2.13.0: the tested version, and on PyPI's mirrors with a CPU build it keeps CUDA away.
TORCH := torch==2.13.0
# The triton that the tests take where torch brings none, and the oldest that must work.
TRITON := 3.7.1
TRITON_OLDEST := 3.6.0
TRITON_NEWER := 3.8.0 3.9.0
DOCTEST := $(firstword $(wildcard /usr/include/doctest/doctest.h /usr/local/include/doctest/doctest.h))

.PHONY: demo test test-cpp test-nccl test-gpu check format sanitize bench bench-gpu install-gpu \
    compile-check compile-check-newer compile-report wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(BIN)/ringkern demo

test: $(VENV)/test test-cpp
	$(BIN)/python -m pytest

# The C++ core's own tests need doctest (Debian: apt-get install doctest-dev).
ifdef DOCTEST
test-cpp: build/core/.built
	$(BIN)/ctest --test-dir build/core --output-on-failure
else
test-cpp:
	@echo 'SKIPPED: C++ tests (tests/cpp): doctest is not installed; apt-get install doctest-dev'
endif

# The loader, its symbols and its gate against real NCCLs: the oldest that will do, and the newest.
NCCL_WHEELS := cu12-2.17.1 cu13-2.32.3
NCCLS := $(NCCL_WHEELS:%=build/nccl/%/nvidia/nccl/lib/libnccl.so.2)

ifdef DOCTEST
test-nccl: build/core/.built $(NCCLS)
	for nccl in $(abspath $(NCCLS)); do TEST_NCCL=$$nccl build/core/tests/cpp/test_library \
	    --test-case='the real library*' || exit 1; done
else
test-nccl:
	@echo 'SKIPPED: C++ tests of the real NCCL: doctest is not installed; apt-get install doctest-dev'
endif

build/nccl/%/nvidia/nccl/lib/libnccl.so.2: | $(VENV)/base
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/nccl/$* \
	    nvidia-nccl-$(subst -,==,$*)
	touch $@

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*.h csrc/*.cpp tests/cpp/*.h tests/cpp/*.cpp

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp tests/cpp/*.h tests/cpp/*.cpp

# The C++ tests under AddressSanitizer + UndefinedBehaviorSanitizer, then under ThreadSanitizer.
ifdef DOCTEST
sanitize: build/address/.built build/thread/.built
	$(BIN)/ctest --test-dir build/address --output-on-failure
	$(BIN)/ctest --test-dir build/thread --output-on-failure
else
sanitize:
	@echo 'SKIPPED: C++ tests under sanitizers: doctest is not installed; apt-get install doctest-dev'
endif

bench: $(VENV)/demo
	$(BIN)/python -m bench.run $(CASE)
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.plot
	$(BIN)/python -m bench.picture

# On a machine with an NVIDIA GPU, and only there: with the torch and triton of PYTHON_GPU, without
# network; what came of it is recorded in bench/results/. Of all tests, or of what ARGS names.
test-gpu: install-gpu
	$(PYTHON_GPU) -m bench.gpu_tests $(ARGS)

# Every kernel against the card's own ceilings and what else is installed, in MINUTES at the most.
MINUTES ?= 8
bench-gpu: install-gpu
	$(PYTHON_GPU) -m bench.run --minutes $(MINUTES) $(or $(CASE),'gpu/*')

# Editable, since of a plain install a record cannot name the commit.
install-gpu:
	$(PYTHON_GPU) -m pip install --quiet --no-index --no-build-isolation --no-deps \
	    --editable .

# Compiles every kernel for GPUs that need not be there, and compares the machine code with
# tests/compile_report.jsonl: under the triton of the tests and under the oldest.
OLDEST := $(abspath $(VENV))/triton-$(TRITON_OLDEST)

compile-check: $(VENV)/test $(OLDEST)/.installed
	$(BIN)/python -m tests.compile_report
	PYTHONPATH=$(OLDEST) $(BIN)/python -m tests.compile_report

compile-report: $(VENV)/test $(OLDEST)/.installed
	$(BIN)/python -m tests.compile_report --write
	PYTHONPATH=$(OLDEST) $(BIN)/python -m tests.compile_report --write

# As far as newer ones work: what they do worse is named, and fails nothing.
NEWER := $(TRITON_NEWER:%=$(abspath $(VENV))/triton-%)

compile-check-newer: $(VENV)/test $(NEWER:%=%/.installed)
	for at in $(NEWER); do PYTHONPATH=$$at $(BIN)/python -m tests.compile_report || true; done

# In front of the environment, so that torch need not be there twice. numpy: the newest with which
# the oldest triton interprets kernels.
$(abspath $(VENV))/triton-%/.installed: | $(VENV)/base
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) \
	    triton==$* $(if $(filter $*,$(TRITON_OLDEST)),'numpy<2.4')
	touch $@

# Builds sdist and wheel, and installs each in an empty environment.
wheel: $(VENV)/dev
	rm -rf dist
	$(BIN)/python -m build
	PYTHON=$(PYTHON) tests/check_dist.sh dist

clean:
	rm -rf build dist $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/base: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet $(TORCH) numpy cmake ninja pybind11 setuptools wheel
	touch $@

# Editable, so that Python changes need no build; rebuilt where the core changed.
$(VENV)/installed: $(VENV)/base $(CORE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/demo $(VENV)/test $(VENV)/dev: $(VENV)/%: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[$*]' \
	    $(if $(filter test,$*),triton==$(TRITON))
	touch $@

build/core/.built build/address/.built build/thread/.built: build/%/.built: $(CORE) $(CPP_TESTS) | $(VENV)/base
	$(BIN)/cmake -S . -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DRINGKERN_PYTHON=OFF -DRINGKERN_TESTS=ON -DRINGKERN_WERROR=ON \
	    -DRINGKERN_SANITIZE=$(filter-out core,$*) -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(BIN)/cmake --build build/$*
	touch $@
