# Every target sets up what it needs: .venv and one pip install, repeated only when
# pyproject.toml or constraints.txt change.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
CORE := .venv/core-installed
TESTS := .venv/tests-installed
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: demo test check bench study report test-browser test-eval test-scan test-triton-3.6.0 test-transformers-5.17.0 \
	test-gpu bench-gpu tune-gpu

demo: $(CORE)
	@$(BIN)/pvcore demo

# Tests come last, so that pytest's summary is the last line on the screen. The Triton interpreter
# is chosen once a process, so the kernels' interpreter tests run before, in one of their own.
test: check
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/kernels/interpreter
	@$(BIN)/python -m pytest -q -n $(WORKERS)

# Needs a Chromium of the system's; without one its tests are skipped, with that reason.
test-browser: $(TESTS)
	@$(BIN)/python -m pytest -q -m browser tests/test_browser.py

check: $(TESTS)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@PYTHONPATH=kernels $(BIN)/lint-imports --no-logo

bench: $(CORE)
	@$(BIN)/python -m benches.run overhead

# About half an hour; stopped, it goes on where it was.
study: $(CORE)
	@$(BIN)/python -m pvcore.world.study --workers $(WORKERS)

report: $(CORE)
	@$(BIN)/python -m benches.report

# These three take whatever Python runs torch on the GPU: nothing is installed there, and wheels
# that were brought along are unpacked into a folder of their own.
UNPACKED := $(if $(wildcard gpu-wheels/*.whl),gpu-wheels/installed)
test-gpu bench-gpu tune-gpu: $(UNPACKED)

gpu-wheels/installed: $(wildcard gpu-wheels/*.whl)
	@rm -rf $@
	@$(PYTHON) -m pip install --quiet --no-index --no-deps --target $@ $^
	@touch $@

test-gpu:
	@PYTHONPATH=.:kernels $(PYTHON) -m benches.gpu_tests $(if $(wildcard gpu-wheels),--wheels gpu-wheels)

bench-gpu:
	@PYTHONPATH=.:kernels:gpu-wheels/installed $(PYTHON) -m benches.gpu_kernels
	@PYTHONPATH=.:kernels:gpu-wheels/installed $(PYTHON) -m benches.gpu_grid
	@PYTHONPATH=.:kernels:gpu-wheels/installed $(PYTHON) -m benches.gpu_grid --minutes 2 \
		--model benches/shapes/llama-3.1-8b.json

# Writes kernels/pvcore_kernels/tuned/<this GPU>.json.
tune-gpu:
	@PYTHONPATH=.:kernels:gpu-wheels/installed $(PYTHON) -m benches.gpu_tune

# For a GPU machine without a network that has torch, Triton and transformers: copy the folder there.
# What pvcore and its tests import, and what that needs beyond those three.
GPU_WHEELS := nnsight cloudpickle greenlet httpx httpcore anyio certifi h11 idna websocket-client zstandard \
	pydantic pydantic-core annotated-types typing-inspection \
	typer annotated-doc shellingham rich markdown-it-py mdurl pygments einops jaxtyping wadler-lindig \
	pytest pluggy iniconfig hypothesis sortedcontainers beartype
gpu-wheels:
	@$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 \
		--platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --dest gpu-wheels \
		-c constraints.txt $(GPU_WHEELS)

# The CUDA build of torch asks for a triton of its own: where that is the build pip finds, the
# pinned one cannot be had beside it, and the second try leaves triton to torch.
$(CORE): EXTRA :=
$(TESTS): EXTRA := [test]
$(CORE) $(TESTS): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pvcore needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv
	@echo "Installing pvcore$(EXTRA) into .venv (a few minutes the first time)"
	@$(INSTALL) -c constraints.txt -e ".$(EXTRA)" || { \
		grep -v '^triton==' constraints.txt > .venv/constraints.txt; \
		$(INSTALL) -c .venv/constraints.txt -e ".$(EXTRA)"; }
	@touch $@ $(CORE)

# The same kernels under the older Triton that CUDA builds of torch still bring along.
OLD_TRITON := 3.6.0
test-triton-$(OLD_TRITON): $(TESTS)
	@test -d .venv/triton-$(OLD_TRITON) || $(INSTALL) --no-deps --target .venv/triton-$(OLD_TRITON) triton==$(OLD_TRITON)
	@PYTHONPATH=.venv/triton-$(OLD_TRITON) TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/kernels/interpreter
	@PYTHONPATH=.venv/triton-$(OLD_TRITON) $(BIN)/python -m pytest -q -n $(WORKERS) tests/kernels/test_aot.py

# Training and the graph engine under an older transformers, whose checkpointing and caches differ.
OLD_TRANSFORMERS := 5.17.0
TRAINING := tests/test_training.py tests/test_training_ddp.py tests/test_recomputation.py tests/test_gradients.py \
	tests/test_callbacks.py tests/test_callbacks_shift.py
test-transformers-$(OLD_TRANSFORMERS): $(TESTS)
	@test -d .venv/transformers-$(OLD_TRANSFORMERS) || $(INSTALL) --no-deps \
		--target .venv/transformers-$(OLD_TRANSFORMERS) transformers==$(OLD_TRANSFORMERS) "huggingface_hub<2"
	@PYTHONPATH=.venv/transformers-$(OLD_TRANSFORMERS) $(BIN)/python -m pytest -q -n $(WORKERS) $(TRAINING) \
		tests/test_graph.py tests/test_graph_caches.py tests/test_graph_requests.py

# Scans on Ray Data, which is half a gigabyte: beside the environment, in the versions of it.
test-scan: $(TESTS)
	@test -d .venv/scan || $(INSTALL) -c constraints.txt --target .venv/scan "ray[data]==2.60.*"
	@PYTHONPATH=.venv/scan $(BIN)/python -m pytest -q tests/test_cluster.py

# Tasks of lm-eval, whose metrics bring a hundred megabytes: beside the environment, in its versions.
test-eval: $(TESTS)
	@test -d .venv/eval || $(INSTALL) -c constraints.txt --target .venv/eval "lm-eval==0.4.13"
	@PYTHONPATH=.venv/eval $(BIN)/python -m pytest -q tests/test_capability.py tests/test_harness.py
