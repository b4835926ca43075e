# Everything a developer or an operator does. Each target installs what it needs into .venv; a second run does so at once.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: up test quick check bench soak clean

.venv/run.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "installing fmzbus (pinned by constraints.txt)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	@echo "installing what the tests need"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

up: .venv/run.stamp          ## the whole system on this machine: make up ARGS="--port 7000"
	@exec $(BIN)/fmzbus up $(ARGS)

test: .venv/dev.stamp        ## every test, warnings are errors
	$(BIN)/pytest $(ARGS)

quick: .venv/dev.stamp       ## the tests that start few processes, under a minute
	$(BIN)/pytest -m "not slow" $(ARGS)

check: .venv/dev.stamp       ## format, lint, strict types, no secrets
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --exclude-files '^tests/|/paper/README.md$$'  # made-up keys, of tests and of worked examples

bench: .venv/dev.stamp       ## speed as ratios against bare references; a table, and build/bench.json
	$(BIN)/python -m tests.bench $(ARGS)

SOAK_S ?= 600
soak: .venv/dev.stamp        ## ten minutes of market data: neither delays nor memory may grow; make soak SOAK_S=60
	$(BIN)/python -m tests.bench.soak --seconds $(SOAK_S)

clean:                       ## caches and the environment; the state folder stays
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
