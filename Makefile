# The commands of fastdiff. `make` alone lists them.
# Everything is made on a bare machine with Python >= 3.10 and, for the compiled part, a C++ compiler.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.install-stamp
TORCH := 2.13.0
# The first interpreter that runs (a version manager's shim may not) and is new enough.
PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python3.10 python3.14, \
  $(if $(shell $(p) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>&1 || echo no),,$(p))))

OLD_TRITON := build/triton-3.6.0/.stamp
# What `make gpu-cache` compiles with: Python 3.12 with torch and that version of Triton.
PYTHON312 ?= python3.12
CHIP ?= sm_90

CPP := $(shell find kernels -name '*.cpp' -o -name '*.h')
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Two processes share the two cores of a small machine.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2
INTERPRET := TRITON_INTERPRET=1
# The python that PYTHON names, else that of .venv where it is there.
ANYPY = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(PY)),$(PYTHON),python3),$(PYTHON))
define newline


endef
# A named step that tells its time: $(call step,name,command)
step = @echo "== $(1)"; start=$$SECONDS; \
  if $(2); then echo "== $(1): $$((SECONDS - start)) s"; \
  else echo "== $(1): FAILED after $$((SECONDS - start)) s"; exit 1; fi

##@ Run

.PHONY: demo demo-ascend
demo: $(STAMP)  ## train a small IU-ViT on the embedded scenes, sample 16 prompts, judge them
	@$(PY) train/demo.py --config demo

demo-ascend: $(STAMP)  ## the same job with a small ASCEND
	@$(PY) train/demo.py --config demo_ascend

##@ Check

.PHONY: test test-full test-gpu memcheck lint types layout unit interpreter interpreter-plans aot \
  sanitize
test: $(STAMP)  ## what CI runs first: lint, types, layout, unit tests, the Triton kernels without a GPU
	@$(MAKE) --no-print-directory lint types layout
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory interpreter aot bench-guard

test-full: $(STAMP) $(OLD_TRITON)  ## `make test`, and the slow tests
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory py312
	$(call step,slow tests,$(PYTEST) -m slow)
	$(call step,slow tests of the compiled CPU kernels,FASTDIFF_TEST_BACKEND=native \
	  $(PYTEST) tests/kernels/backends -m slow)
	$(call step,slow tests of the Triton kernels,$(INTERPRET) $(PYTEST) tests/kernels/backends -m slow)
	@$(MAKE) --no-print-directory sanitize
	@$(MAKE) --no-print-directory interpreter-plans
	$(call step,ahead-of-time compile of everything,$(PY) -m benchmarks.aot_report --full)

# On a machine with a GPU as one finds it, perhaps without a package index: with the python that
# PYTHON names, else with .venv where it is there. TEST and MEMCHECK hold further arguments.
test-gpu:  ## the Triton kernels' tests on this machine's GPU
	@PYTHONPATH=.:kernels $(ANYPY) tests/run_on_gpu.py $(TEST)

memcheck:  ## every op on this machine's GPU under compute-sanitizer
	@PYTHONPATH=.:kernels $(ANYPY) tests/kernels/memcheck.py $(MEMCHECK)

lint: $(STAMP)  ## ruff and clang-format
	$(call step,lint,$(PY) -m ruff check . && $(PY) -m ruff format --check . \
	  && $(VENV)/bin/clang-format --dry-run -Werror $(CPP))

types: $(STAMP)  ## mypy
	$(call step,types,$(PY) -m mypy)

layout: $(STAMP)  ## the rules about files and imports
	$(call step,layout,$(PY) -m pytest tests/test_layout.py)

unit: $(STAMP)  ## all tests that are not slow
	$(call step,unit tests,$(PYTEST) -m "not slow" --ignore tests/test_layout.py)
	$(call step,compiled CPU kernels,FASTDIFF_TEST_BACKEND=native $(PYTEST) tests/kernels/backends -m "not slow")

interpreter: $(STAMP)  ## the Triton kernels' tests, interpreted on the CPU
	$(call step,Triton kernels interpreted,$(INTERPRET) $(PYTEST) tests/kernels/backends -m "not slow")

# Else the interpreter sees only the block sizes that a launcher takes for it.
interpreter-plans: $(STAMP)  ## the same with block sizes of GPUs: all for sm_90, drawn shapes for other families
	$(call step,Triton kernels interpreted as on sm_90,FASTDIFF_PLAN=sm_90 $(INTERPRET) \
	  $(PYTEST) tests/kernels/backends -m "not slow")
	$(foreach family,sm_80 sm_100 gfx942,$(call step,Triton kernels interpreted as on $(family),\
	  FASTDIFF_PLAN=$(family) $(INTERPRET) $(PYTEST) tests/kernels/backends -m "not slow" -k any_shape)$(newline))

aot: $(STAMP) $(OLD_TRITON)  ## compile every Triton kernel by two versions of Triton and judge the machine code
	$(call step,ahead-of-time compile,$(PY) -m benchmarks.aot_report --quick)

# The version that GPU machines have, in a folder of its own.
build/triton-%/.stamp: | $(STAMP)
	@echo "== triton $*: installing it into build/triton-$*"
	@$(PY) -m pip install -q --no-deps --upgrade --target build/triton-$* triton==$*
	@touch $@

# What a sanitizer finds ends the test's process; its report is build/sanitize/report.<pid>.
SANITIZED := build/sanitize/libfastdiff_cpu.so
sanitize: $(STAMP)  ## the compiled CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(VENV)/bin/cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Sanitize \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) \
	  -DTORCH_ROOT=$$($(PY) -c 'import torch; print(*torch.__path__)') >/dev/null
	$(call step,sanitizer build,$(VENV)/bin/cmake --build build/sanitize >/dev/null)
	$(call step,compiled CPU kernels sanitized,FASTDIFF_NATIVE_LIBRARY=$(SANITIZED) FASTDIFF_TEST_BACKEND=native \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:log_path=build/sanitize/report $(PYTEST) tests/kernels/backends \
	  tests/kernels/test_native_boundary.py -m "not slow")

##@ Measure

.PHONY: bench bench-full bench-guard bench-gpu bench-gpu-tune gpu-cache
bench: $(STAMP)  ## the benchmarks, small, on the CPU
	@$(PY) -m pytest benchmarks/ --benchmark-only

bench-full: $(STAMP)  ## the paper's shapes and torch.compile, for hours, into benchmarks/results
	@$(PY) -m pytest benchmarks/ --benchmark-only --full --compile \
	  --rounds 15 --seconds 60 --rows benchmarks/results/cpu-$$(date -u +%Y%m%d).json

bench-guard: $(STAMP)  ## a few ops and models, held against this machine's baseline
	$(call step,speed against eager,KINETO_LOG_LEVEL=99 $(PY) -m benchmarks.guard)

bench-gpu:  ## on this machine's GPU, in 8 minutes: every op checked and timed, tests, rivals, training
	@PYTHONPATH=.:kernels $(ANYPY) -m benchmarks.run_gpu $(BENCH)

bench-gpu-tune:  ## tune the kernels' block sizes on this machine's GPU, in 4 minutes
	@PYTHONPATH=.:kernels $(ANYPY) -m benchmarks.tune $(BENCH)

gpu-cache:  ## compile the kernels for a GPU that is not here (CHIP=sm_90), to carry them to it
	@PYTHONPATH=.:kernels $(PYTHON312) -m benchmarks.gpu_cache --chip $(CHIP)

##@ Develop

.PHONY: venv py312 format clean help
venv: $(STAMP)  ## the environment in .venv, with everything installed and the compiled part built

format: $(STAMP)  ## let the formatters rewrite the sources
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CPP)

clean:  ## remove what was built, not .venv and not runs/
	@rm -rf build dist *.egg-info kernels/fastdiff_kernels/libfastdiff_cpu.so \
	  kernels/fastdiff_kernels/native_absent.txt .pytest_cache .mypy_cache .ruff_cache $(STAMP)

help:  ## this list
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { print "\n" substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- a machine with a GPU as one finds it ----------------------------------------------------------

# Python 3.12 with no more packages than the benchmarks need: `make bench-gpu` is rehearsed there.
# FASTDIFF_PY312 names another one. The interpreter of triton 3.6 does not run with NumPy 2.4.
PY312 = $(firstword $(foreach p,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python), \
  $(if $(shell $(p) -c 'import venv, ensurepip' 2>&1 || echo no),,$(p))))
BARE := "numpy<2.4" einops transformers pytest pytest-benchmark hypothesis triton==3.6.0
py312:
	@if [ -n "$${FASTDIFF_PY312:-}" ]; then echo "== Python 3.12: $$FASTDIFF_PY312"; \
	elif [ -n "$(PY312)" ]; then $(MAKE) --no-print-directory build/py312; \
	else echo "== Python 3.12 is not here: tests that need it are skipped"; fi

build/py312:
	@mkdir -p build; rm -rf $@.made; start=$$SECONDS; trap 'rm -rf $@.made' EXIT; \
	{ $(PY312) -m venv $@.made && \
	  { $@.made/bin/python -m pip install -q torch==2.11.0+cpu 2>/dev/null || \
	    $@.made/bin/python -m pip install -q torch==2.11.0; } && \
	  $@.made/bin/python -m pip install -q $(BARE); } && \
	mv $@.made $@ && echo "== build/py312: $$((SECONDS - start)) s"

# --- the environment -------------------------------------------------------------------------------

$(PY):
	@test -n "$(PYTHON)" || { echo "fastdiff needs Python >= 3.10 with venv; set PYTHON=..."; exit 1; }
	@echo "== .venv: $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# A torch that is there stays. Where no NVIDIA GPU is to be seen the CPU build is tried first: with it
# installed, no CUDA package arrives later.
$(VENV)/.torch-stamp: | $(PY)
	@if $(PY) -c 'import torch' 2>/dev/null; then \
	  echo "== torch: $$($(PY) -c 'import torch; print(torch.__version__)') is there"; \
	else \
	  start=$$SECONDS; \
	  builds="torch==$(TORCH) torch>=2.10"; \
	  nvidia-smi >/dev/null 2>&1 || builds="torch==$(TORCH)+cpu $$builds"; \
	  for build in $$builds; do \
	    echo "== torch: installing $$build"; \
	    if $(PY) -m pip install -q "$$build"; then break; fi; \
	    echo "== torch: $$build is not to be had"; \
	  done; \
	  $(PY) -W ignore -c 'import torch' || { echo "== torch could not be installed"; exit 1; }; \
	  echo "== torch: $$((SECONDS - start)) s"; \
	fi
	@touch $@

# Without build isolation, so that the tools are those of constraints.txt and a rebuild is quick.
$(STAMP): pyproject.toml constraints.txt setup.py CMakeLists.txt $(CPP) | $(VENV)/.torch-stamp
	@echo "== fastdiff: installing what pyproject.toml names, building the compiled part"
	@start=$$SECONDS; \
	$(PY) -m pip install -q "setuptools>=77" cmake ninja -c constraints.txt; \
	$(PY) -m pip install -q --no-build-isolation -e ".[train,dev]" -c constraints.txt; \
	$(PY) -c 'from fastdiff_kernels import _native as n; print("== compiled part:", n.why_absent() or n.cpu_level())'; \
	echo "== fastdiff: $$((SECONDS - start)) s"
	@touch $@
