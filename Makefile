# Every target does its own set-up: a clean clone needs Python 3.10+ and a C++ compiler, nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
READY  := $(VENV)/.ready
NATIVE := setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: venv demo test lint bench gpu clean
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
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only

# A machine with an NVIDIA GPU: the Python and torch already there, no network. Results under $(OUT).
OUT ?= runs/gpu
gpu:
	KDFAST_REQUIRE_NATIVE=1 KDFAST_CUDA=ON KDFAST_CUDA_ARCHITECTURES=$$($(PYTHON) -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') \
	  $(PYTHON) setup.py -q build_ext --inplace
	mkdir -p $(OUT)
	$(PYTHON) -m pytest tests/ops tests/test_compile_only.py -m "cuda or not slow" -q --junitxml=$(OUT)/tests.xml
	$(PYTHON) -m pytest benchmarks --benchmark-only -k cuda --benchmark-json=$(OUT)/benchmark.json

clean:
	rm -rf build dist *.egg-info kdfast/_C.*.so kdfast/_build_failure.txt
