# Each target sets up what it needs, once: .venv with the requirements, the package in it (editable), build/dev.
# PYTHON=... and CXX=... choose other ones than the first that fit; TORCH="torch==2.10.*" another torch.

VENV := .venv
BIN := $(VENV)/bin
DEV := build/dev
CMAKE := $(BIN)/cmake
TORCH ?= torch>=2.10
export PYTHON TORCH
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN)
export CTEST_PARALLEL_LEVEL ?= $(CMAKE_BUILD_PARALLEL_LEVEL)

CTEST = $(BIN)/ctest --progress --output-on-failure --no-tests=error --test-dir
# A process for each core, one thread each: a file of tests stays together, with what it has set up.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
# Two makes at once take turns at the build folder.
LOCK := $(shell command -v flock >/dev/null && echo flock $(DEV)/.lock)
# ThreadSanitizer needs addresses that are not spread too widely.
FIXED := $(shell setarch -R true 2>/dev/null && echo setarch -R)

.PHONY: help test test-long test-all gpu-test demo bench lint sanitize asan tsan native clean

help:
	@echo 'make test      build everything, run the C++ and the Python tests'
	@echo 'make test-long the Python tests that are long and rare (marked slow); make test-all: both'
	@echo 'make gpu-test  everything that needs a GPU, on one, into gpu-test.json (8 minutes at most after the build)'
	@echo 'make demo      lighthouse compare: a small model trained dense, with a window and with Lighthouse (5 minutes)'
	@echo 'make bench     time the C++ functions and one attention layer against dense attention'
	@echo 'make lint      clang-format, clang-tidy, ruff, mypy'
	@echo 'make sanitize  C++ tests under Address-, UndefinedBehavior- and ThreadSanitizer'
	@echo 'make native    build the native library and put it where the installed package looks for it'
	@echo 'make clean     remove what was built; .venv stays'

$(VENV)/.ready: pyproject.toml scripts/setup.sh
	@scripts/setup.sh environment
	@touch $@

$(DEV)/.installed: $(VENV)/.ready
	@scripts/setup.sh package $(DEV)
	@touch $@

$(DEV)/.tests: $(DEV)/.installed
	@$(LOCK) $(CMAKE) -DLIGHTHOUSE_TESTS=ON $(DEV) >$(DEV)/configure.log || (cat $(DEV)/configure.log; false)
	@touch $@

native: $(DEV)/.installed
	@$(LOCK) $(CMAKE) --build $(DEV) --target lighthouse_torch
	@$(LOCK) scripts/setup.sh library $(DEV)

test: $(DEV)/.tests
	@$(LOCK) $(CMAKE) --build $(DEV)
	@$(LOCK) scripts/setup.sh library $(DEV)
	$(CTEST) $(DEV)
	$(PYTEST) -m "not slow"

test-long: native
	$(PYTEST) -m slow

test-all: test test-long

gpu-test: native $(DEV)/.tests
	@$(LOCK) $(CMAKE) --build $(DEV) --target lighthouse_tests
	$(BIN)/python scripts/gpu_test.py --cpp-tests $(DEV)/lighthouse_tests --output gpu-test.json

demo: native
	$(BIN)/lighthouse compare

bench: native
	@$(LOCK) $(CMAKE) -DLIGHTHOUSE_BENCH=ON $(DEV) >$(DEV)/configure.log || \
	  (cat $(DEV)/configure.log; $(CMAKE) -DLIGHTHOUSE_BENCH=OFF $(DEV) >/dev/null; false)
	@$(LOCK) $(CMAKE) --build $(DEV) --target lighthouse_bench
	$(DEV)/lighthouse_bench
	$(BIN)/lighthouse bench --parts

lint: $(DEV)/.tests
	@scripts/lint.sh $(DEV)

sanitize: asan tsan

asan: SANITIZERS := address,undefined
tsan: SANITIZERS := thread
tsan: CTEST := $(FIXED) $(CTEST)
asan tsan: $(VENV)/.ready
	@mkdir -p build
	@$(CMAKE) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DLIGHTHOUSE_TESTS=ON -DLIGHTHOUSE_SANITIZE=$(SANITIZERS) -B build/$@ >build/$@.log || (cat build/$@.log; false)
	@$(CMAKE) --build build/$@
	$(CTEST) build/$@

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
