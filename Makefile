# Every target first makes .venv where it is missing or out of date (tools/setup_env.sh); a second run finds it ready at once.
# PYTHON=python3.12 make test    chooses the Python that .venv is made with.

.PHONY: help setup demo test lint bench

python := .venv/bin/python

help:
	@echo "make demo    set up, then train, evaluate and draw a small detector"
	@echo "make test    set up, then lint and run all tests"
	@echo "make lint    set up, then ruff, and mypy on pe_spatial/encoder"
	@echo "make bench   set up, then measure speed and memory"
	@echo "make setup   set up only"

setup:
	@tools/setup_env.sh

demo: setup
	$(python) tools/demo.py

test: lint
	$(python) -m pytest -m ""

lint: setup
	$(python) -m ruff check .
	$(python) -m mypy

bench: setup
	$(python) benchmarks/encoder.py
	$(python) benchmarks/vos.py
	$(python) benchmarks/propagation.py
