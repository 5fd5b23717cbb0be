# Every target sets up what it needs: .venv and one pip install, repeated only when
# pyproject.toml or constraints.txt change.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
CORE := .venv/core-installed
TESTS := .venv/tests-installed
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: demo test check bench report

demo: $(CORE)
	@$(BIN)/pvcore demo

# Tests come last, so that pytest's summary is the last line on the screen. The Triton interpreter
# is chosen once a process, so the kernels' interpreter tests run before, in one of their own.
test: check
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/kernels/interpreter
	@$(BIN)/python -m pytest -q -n $(WORKERS)

check: $(TESTS)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@PYTHONPATH=kernels $(BIN)/lint-imports --no-logo

bench: $(CORE)
	@$(BIN)/python -m benches.run overhead

report: $(CORE)
	@$(BIN)/python -m benches.report

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
