# Every target first makes .venv where it is missing or out of date (tools/setup_env.sh); a second run finds it ready at once.
# PYTHON=python3.12 make test    chooses the Python that .venv is made with.

.PHONY: help setup demo test test-matrix check lint bench

python := .venv/bin/python
core_tests := $(addprefix tests/,encoder depth/test_metrics.py depth/test_heads.py depth/test_dpt.py tracking/vos \
	cli/test_common.py cli/test_main.py engine/test_console.py test_imports.py test_atomic.py test_docs.py)

help:
	@echo "make demo    set up, then train, evaluate and draw a small detector"
	@echo "make test    set up, then lint and run all tests"
	@echo "make check   set up, then lint and run the tests of the core, in less than a minute"
	@echo "make lint    set up, then ruff and mypy"
	@echo "make bench   set up, then measure speed and memory"
	@echo "make setup   set up only"
	@echo "make test-matrix ENV=d   run the tests in an environment of docs/environments.md; needs nox"

setup:
	@tools/setup_env.sh

demo: setup
	$(python) tools/demo.py

test: lint
	OMP_NUM_THREADS=1 $(python) -m pytest -m "not long" -n auto --maxprocesses 8 --dist worksteal

test-matrix:
	nox --session $(or $(ENV),d)

check: lint
	OMP_NUM_THREADS=1 $(python) -m pytest -q -n auto --maxprocesses 8 --dist loadfile $(core_tests) \
		-k "not timm_parity and not compile"

lint: setup
	$(python) -m ruff check .
	$(python) -m mypy

bench: setup
	$(python) benchmarks/encoder.py
	$(python) benchmarks/growth.py --rounds 1
	$(python) benchmarks/vos.py
	$(python) benchmarks/propagation.py
	$(python) benchmarks/predict.py
	$(python) benchmarks/multitask.py
