# Two commands on a fresh machine with python3 (3.11 or later): `make demo` and `make test`.
# `make test-slurm`, as root on Debian, installs Slurm and tests sweeps on it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-tpu test-slurm lint format clean

demo: $(VENV)/installed
	$(BIN)/python -m launch.demo --output=demo

test: $(VENV)/installed-dev lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# the TPU kernels through the TPU's own compiler, on any machine: libtpu goes into an environment of its own
test-tpu: $(VENV)-tpu/installed
	JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 $(VENV)-tpu/bin/python -m pytest -n 2 --dist worksteal tests/test_tpu.py

test-slurm: $(VENV)/installed-dev
	{ command -v slurmctld && command -v munged; } >/dev/null || \
	  { apt-get update && apt-get install --yes --no-install-recommends slurm-wlm munge; }
	$(BIN)/python -m pytest tests/test_slurm.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version); UniGist-JAX needs Python 3.11 or later: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements-peers.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-peers.txt
	touch $@

$(VENV)-tpu/installed: requirements-tpu.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/python -m pip install --quiet -r requirements-tpu.txt -c requirements-dev.txt \
	  pytest pytest-xdist hypothesis beartype
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-tpu demo
