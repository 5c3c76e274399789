## make demo        train a small network on handwritten digits, show what it predicts and how fast it is
## make test        every test but the exhaustive cases, with a part of test-cuda and of test-triton
## make test-full   every test
## make test-cuda   operators on the CUDA kernels, emulated on the CPU; SANITIZER=address,undefined or thread
## make test-triton operators on the Triton kernels, in its interpreter
## make test-torch  one wheel, built against torch $(TORCH), tested on torch VERSION (newest, or for example 2.11.0);
##                  TESTS files; a CPU build, such as 2.13.0+cpu, goes without training
## make sanitize    operators under AddressSanitizer and UBSan (gcc), FUZZ good and FUZZ bad calls an operator
## make bench       times of the operators beside plain PyTorch
## make lint        ruff, mypy, clang-format
##
## Each makes the virtual environment that it needs the first time, with PYTHON, and makes it anew when pyproject.toml
## changes. Remove .env-torch-newest to move on to a torch that came out since.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: help build wheel demo test test-full test-cuda test-triton test-torch sanitize bench lint

PYTHON ?= python3
TORCH := 2.14.1
VERSION ?= newest
TESTS :=
FUZZ ?= 2000

help:
	@sed -n 's/^## \?//p' Makefile | sed 's/$$(TORCH)/$(TORCH)/'

# --- environments ------------------------------------------------------------------------------------------------

# The working copy, installed in place: a change to a Python file needs nothing, one to a C++ file `make build`.
DEV := .env-dev/bin/python
# One architecture is enough to see that the CUDA kernels compile; a wheel has all.
.env-dev/stamp build: export TORCH_CUDA_ARCH_LIST := $(or $(TORCH_CUDA_ARCH_LIST),9.0)
.env-dev/stamp: pyproject.toml
	rm -rf .env-dev
	$(PYTHON) -m venv .env-dev
	$(DEV) -m pip install -q torch==$(TORCH) 'setuptools>=77' ninja
	$(DEV) -m pip install -q --no-build-isolation -e '.[test,train,lint,triton]'
	touch $@

build: .env-dev/stamp
	$(DEV) setup.py -q build_ext --inplace

# setuptools would pack what an earlier build left in build/lib, hence the rm.
wheel: .env-dev/stamp
	rm -rf build/lib* build/bdist* build/wheel
	$(DEV) -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .

CHECK := .env-torch-$(VERSION)
comma := ,
.env-torch-%/stamp: pyproject.toml | wheel
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q torch$(if $(filter newest,$*),,==$*) \
		"$$(echo build/wheel/*.whl)[test$(if $(findstring cpu,$*),,$(comma)train)]"
	touch $@

# --- tests -------------------------------------------------------------------------------------------------------

# Threads that wait do not spin, because two processes share the processors.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(DEV) -m pytest -n 2

test: build
	$(PYTEST)
	$(MAKE) --no-print-directory test-cuda
	$(MAKE) --no-print-directory test-triton PART='$(SMALL)'

# With AddressSanitizer the results are compared as without. ThreadSanitizer takes three times as long, Triton's
# interpreter ten times: a part, in which every kernel is.
test-full: build
	$(PYTEST) --full
	$(MAKE) --no-print-directory test-cuda PART='$(ALL)' SANITIZER=address,undefined
	$(MAKE) --no-print-directory test-cuda SANITIZER=thread
	$(MAKE) --no-print-directory test-triton

# The kernels for GPUs, without one. Threads and interpreters are slow: PART is the selection.
ALL := not benchmark and not exports and not twice and not identity and not threads
PART := ((forward_and_gradients and float32 and channels_last) or (forward_and_gradients and bfloat16 and channels_first) \
	or (result_and_state and not True) or (opcheck and not everywhere) or non_finite or every_element or chunks or one_kernel \
	or cancel or infinite or (with_channels and float32)) and not benchmark and not N256 and not 300
SMALL := (chunks or one_kernel or forward_and_gradients or (result_and_state and not True)) \
	and (one_kernel or (float32 and channels_last) or (bfloat16 and channels_first and not scan and not ss2d and not wavelet)) \
	and not benchmark and not N256 and not 300 and not 150 and not 1100 and not 37x and not x37 \
	and not 257x and not 72x6 and not 48x16 and not 38x13 and not levels
SANITIZER :=
runtime = $(shell $(CXX) -print-file-name=lib$1.so)
PRELOADED := $(if $(findstring address,$(SANITIZER)),$(call runtime,asan) $(call runtime,ubsan) $(call runtime,stdc++),\
	$(if $(findstring thread,$(SANITIZER)),$(call runtime,tsan)))
test-cuda: .env-dev/stamp
	PYTHONPATH=tests MOBILEMAMBA_EMULATION=$(SANITIZER) LD_PRELOAD="$(PRELOADED)" PYTHONMALLOC=malloc OMP_NUM_THREADS=1 \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
		TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 \
		$(PYTEST) --capture=sys -p emulation.plugin tests/test_ops.py tests/test_updates.py \
		-k '$(PART)'

test-triton: .env-dev/stamp
	TRITON_INTERPRET=1 MOBILEMAMBA_BACKEND=triton $(PYTEST) tests/test_ops.py tests/test_updates.py \
		tests/test_triton.py -k '$(PART)'

# Tests of an installed or separately built package run from a copy of tests/, beside which there is no source. First
# comes which package and torch they get; without the compiled part its import warns, which is an error here.
copy-tests = rm -rf $1 && mkdir -p $1 && cp -r tests pyproject.toml $1 && rm -f $1/tests/test_build.py $1/tests/test_symbols.py
WHICH := -W error::RuntimeWarning -c 'import mobilemamba_kernels as k, torch; \
	print("torch", torch.__version__, "runs", k.__file__, k.report(), sep="\n")'

test-torch: wheel $(CHECK)/stamp
	$(CHECK)/bin/python -m pip install -q --force-reinstall --no-deps build/wheel/*.whl
	$(call copy-tests,$(CHECK)/copy)
	cd $(CHECK)/copy && ../bin/python $(WHICH)
	cd $(CHECK)/copy && OMP_WAIT_POLICY=PASSIVE ../bin/python -m pytest -n 2 $(TESTS)

# Preloaded, because python itself is not built with the sanitizers, and libstdc++ with them for their exception hooks.
# Python and torch keep memory until the process ends, so leaks are not reported. A request for too much memory fails
# as malloc does, so that torch can raise its error. An error aborts, so that pytest names the test; its report passes by
# pytest only where that leaves file descriptors alone.
SANITIZE := $(CURDIR)/build/sanitize
MEMORY_TESTS := not compiles and not exports and not twice and not opcheck
SANITIZED = LD_PRELOAD="$(foreach lib,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(lib).so))" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:abort_on_error=1 PYTHONMALLOC=malloc \
	PYTHONPATH=$(SANITIZE)/lib MOBILEMAMBA_FUZZ_EXAMPLES=$(FUZZ) $(CURDIR)/$(DEV)

sanitize: .env-dev/stamp
	rm -rf $(SANITIZE)
	CXX='$(CXX)' MOBILEMAMBA_CUDA=0 MOBILEMAMBA_SANITIZE=address,undefined $(DEV) setup.py -q build --build-lib $(SANITIZE)/lib
	$(call copy-tests,$(SANITIZE)/copy)
	cd $(SANITIZE)/copy && $(SANITIZED) $(WHICH)
	cd $(SANITIZE)/copy && $(SANITIZED) -m pytest --capture=sys tests/test_fuzz.py tests/test_ops.py -k '$(MEMORY_TESTS)'

demo: build
	.env-dev/bin/mobilemamba demo

bench: build
	$(DEV) -m pytest benchmarks --benchmark-columns=median,iqr,rounds --benchmark-sort=name

lint: .env-dev/stamp
	.env-dev/bin/ruff check
	.env-dev/bin/ruff format --check
	.env-dev/bin/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs .env-dev/bin/clang-format --dry-run -Werror
