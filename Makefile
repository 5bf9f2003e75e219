# One command for everything: `make check`. PYTHON may name another interpreter.
PYTHON ?= python3

.PHONY: check lint types test slow

check: lint types test

lint:
	$(PYTHON) -m ruff check src tests benchmarks
	$(PYTHON) -m ruff format --check src tests benchmarks

types:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow and not oracle and not browser"

slow:
	$(PYTHON) -m pytest -m "slow or oracle or browser"
