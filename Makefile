# Every target does its own set-up: a clean clone needs Python 3.10+ and a C++ compiler, nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
READY  := $(VENV)/.ready
NATIVE := setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: venv demo test fuzz sanitize lint bench gpu clean
venv: $(READY)

# One torch without CUDA's gigabytes where there is no GPU: first from the sources pip already has, then from
# PyTorch's own index of CPU builds.
CPU_INDEX := https://download.pytorch.org/whl/cpu
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null 2>&1 || [ "$$(uname -s)" = Darwin ]; then \
	  $(PIP) install -q -c constraints.txt torch; \
	else \
	  $(PIP) install -q -c constraints.txt "torch==2.13.0+cpu" 2>/dev/null \
	  || $(PIP) install -q -c constraints.txt --extra-index-url $(CPU_INDEX) "torch==2.13.0+cpu" \
	  || $(PIP) install -q -c constraints.txt torch; \
	fi
	touch $@

$(READY): $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) install -q -c constraints.txt setuptools wheel cmake ninja pybind11
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/kdfast compare --data digits --out runs/demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Opt-in: random cases of every op against fp64 truth. The seed is printed at the start; KDFAST_FUZZ_SEED sets it.
KDFAST_FUZZ_CASES ?= 10000
fuzz: $(READY)
	KDFAST_FUZZ_CASES=$(KDFAST_FUZZ_CASES) $(BIN)/python -m pytest tests/ops -k test_random_shapes -n 2 --dist loadfile \
	  --timeout=0 -rP

# Opt-in, GCC on Linux: the op tests on C++ kernels built with AddressSanitizer and UBSan, in a place of their own. The
# runtime comes first in a Python that was not built with it; libstdc++ with it, whose exceptions it has to see.
# What PyTorch and Python leave allocated at the end is no leak of ours. pytest leaves file descriptor 2 alone, or the
# report would die with the process.
ASAN := build/sanitize/lib
sanitize: $(READY)
	rm -rf $(ASAN)
	KDFAST_REQUIRE_NATIVE=1 KDFAST_CUDA=OFF KDFAST_SANITIZE=address,undefined \
	  $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(ASAN)
	ln -s ../../../tests ../../../benchmarks ../../../pyproject.toml $(ASAN)
	export LD_PRELOAD="$$(for x in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$x.so; done | paste -sd:)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 && cd $(ASAN) && PYTHONPATH= && \
	$(CURDIR)/$(BIN)/python -c "from kdfast._native import build_info; assert build_info['sanitizers'], build_info" && \
	$(CURDIR)/$(BIN)/python -m pytest tests/ops tests/data/test_augment_images.py \
	  -k "not triton and not math_headers" -m "not cuda" -p no:cacheprovider --capture=sys

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only

# A machine with an NVIDIA GPU, no network: in the Python already there torch, cmake, ninja and what pyproject.toml's
# "dev" lists. Tests that need a GPU, then the benchmarks, whatever became of the tests; ten minutes at most with 16
# cores, results under $(OUT). A kernel that hangs or breaks the CUDA context takes a worker with it, and no more.
OUT ?= runs/gpu
WORKERS ?= 8
TEST_SECONDS ?= 240
BENCH_SECONDS ?= 200
gpu:
	mkdir -p $(OUT)
	PATH="$$PATH:/usr/local/cuda/bin" KDFAST_REQUIRE_NATIVE=1 KDFAST_CUDA=ON KDFAST_CUDA_ARCHITECTURES=$$($(PYTHON) -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') \
	  $(PYTHON) setup.py -q build_ext --inplace || { cp build/cmake-*/kdfast-build.log $(OUT); exit 1; }
	failed=0; \
	TORCHINDUCTOR_COMPILE_THREADS=1 timeout -s INT -k 20 $(TEST_SECONDS) $(PYTHON) -m pytest -m cuda -q --tb=short \
	  tests/ops tests/losses tests/data tests/meta/test_graphs.py tests/test_gpu_rules.py --continue-on-collection-errors \
	  -n $(WORKERS) --dist worksteal -p tests.fresh_worker --timeout 90 --timeout-method thread \
	  --junitxml=$(OUT)/tests.xml || failed=$$?; \
	$(PYTHON) -m benchmarks.apart -k cuda --seconds $(BENCH_SECONDS) --out $(OUT)/benchmark.json || failed=$$?; \
	exit $$failed

clean:
	rm -rf build dist *.egg-info kdfast/_C*.so kdfast/_build_failure.txt
