# make demo | test | lint | compare | clean. Each target first sets up what it needs: an environment in $(VENV) with the
# exact versions of requirements.lock and this checkout, editable.
#
#   make test VENV=/tmp/env                         use or create another environment
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                                                   Linux without a GPU: PyPI's torch brings 2 GB of CUDA libraries
#   make test PYTEST_ARGS="-k config -x"            arguments for pytest

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$p" && break; done)
PIP_ARGS ?=
PYTEST_ARGS ?=
STAMP := $(VENV)/.dllm-jepa-installed
BIN := $(VENV)/bin

# Byte code that is not kept is compiled again by every process that a test starts: 19 seconds of imports instead of 6.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint compare install clean

demo: $(STAMP)
	$(BIN)/python demo/run.py

compare: $(STAMP)
	$(BIN)/python demo/compare.py

# Two workers, one thread each: the tests are many small ones, and more threads per process only get in each other's way.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict dllm_jepa recipes/dllm_jepa_full.py recipes/dllm_jepa_eval.py recipes/dllm_jepa_generate.py

install: $(STAMP)

# The lock comes first and the project without dependencies: pip has nothing to choose. Without build isolation the
# build backend is the locked one, too. Without --no-compile half of the time would go into byte code of modules that
# nothing here imports.
$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile $(PIP_ARGS) -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
