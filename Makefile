# make demo    set up, then one picture and one voice -> out/demo.mp4
# make test    set up, then every test but the slow ones
#
# PYTHON=python3.12        the Python to build the environment with (3.11 or later)
# VENV=.venv               where the environment lies
# TORCH_INDEX_URL=...      a package index to take PyTorch from, for example one with CPU builds
# PYTEST_ARGS="-n 0 -x"    arguments of the tests

VENV ?= .venv
PYTEST_ARGS ?= -n auto --dist loadfile
PYTHON ?= $(shell for candidate in python3 python3.12 python3.11; do \
	$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$candidate && break; done)

IN := $(VENV)/bin
INSTALL := $(IN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
FLOORS := kernels graphs checkpoints_tools runtime train bench

.PHONY: demo test lint setup setup-dev clean

demo: setup
	$(IN)/kinora generate --image examples/faces/mira.png --audio examples/voices/welcome.flac --output out/demo.mp4 --overwrite

test: setup-dev
	$(IN)/python -m pytest $(PYTEST_ARGS)

lint: setup-dev
	$(IN)/ruff check .
	$(IN)/ruff format --check .
	mkdir -p build/types/kinora
	for floor in $(FLOORS); do ln -sfn ../../../$$floor build/types/kinora/$$floor; done
	MYPYPATH=build/types $(IN)/mypy

setup: $(VENV)/.kinora
setup-dev: $(VENV)/.kinora-dev

# PyTorch goes first and alone: whatever needs it then finds it, instead of fetching the largest build there is.
$(VENV)/.kinora: pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "kinora needs Python 3.11 or later: install it, or say make PYTHON=/path/to/python"; exit 1; }
	test -x $(IN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	$(INSTALL) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $$(grep '^torch==' constraints.txt)
	$(INSTALL) --no-build-isolation --editable .
	touch $@

$(VENV)/.kinora-dev: $(VENV)/.kinora
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist out *.egg-info
