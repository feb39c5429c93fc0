# Two commands do everything on a bare machine (Python >= 3.10, pip, make):
#   make demo    set up, train on real data, show what averaging gives
#   make test    set up, run every test
#   make ssl     self-supervised and semi-supervised learning on real images, and a report of it
#   make horizon a small diffusion model of real images, and how far back its average should look
#   make bench   the speed of updates, beside the limit of the machine and the newest peers
# `CONSTRAINTS=/dev/null make test` tests against whatever torch resolves to.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2
BENCH := .venv-bench

export PIP_CONSTRAINT := $(abspath $(CONSTRAINTS))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo ssl horizon bench test lint types docs wheel format clean

demo: $(VENV)/.ready
	$(RUN) examples/teacher_student.py
	$(RUN) examples/digits.py

ssl: $(VENV)/.ready
	$(RUN) examples/ssl/report.py

horizon: $(VENV)/.ready
	$(RUN) examples/choose_the_horizon.py

bench: $(BENCH)/.ready
	$(BENCH)/bin/python benchmarks/update.py --out docs

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS)

lint: $(VENV)/.ready
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

types: $(VENV)/.ready
	$(RUN) -m mypy

docs: $(VENV)/.ready
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html

# The wheel is built, installed into an environment of its own and tried from another folder.
wheel: $(VENV)/.ready
	$(RUN) tests/wheel.py

format: $(VENV)/.ready
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) $(BENCH) build dist out src/polyak/engine/_lerp* docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The environment is made once; it is made again only when what it is made from changes. timm needs
# torchvision for other things than its averages, and comes without it.
$(VENV)/.ready: pyproject.toml setup.py src/polyak/engine/lerp.c $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade "pip>=25.1"
	$(RUN) -m pip install --quiet --editable . --group dev
	$(RUN) -m pip install --quiet --no-deps "timm>=1.0.31"
	touch $@

# Peers of the benchmark, in an environment of their own: with transformers beside it diffusers asks
# about DeepSpeed at each tensor.
$(BENCH)/.ready: pyproject.toml setup.py src/polyak/engine/lerp.c $(CONSTRAINTS)
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BENCH)/bin/python -m pip install --quiet --editable . --group bench
	$(BENCH)/bin/python -m pip install --quiet --no-deps "timm>=1.0.31"
	touch $@
