# make demo: prune a vision-language model and look at what it kept.   make test: run every test.   make docs: build the site.
# make test-fast: the quick tests of the core.   make explore MINUTES=60: property tests with new examples, again and again.
PYTHON ?= python3
MINUTES ?= 10
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal
export PYTHONUNBUFFERED := 1

.PHONY: install demo check test test-fast explore lint speed docs clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch torchvision
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

demo: install
	$(BIN)/vltprune demo --output demo

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

test: check
	$(PYTEST)

test-fast: check
	HYPOTHESIS_PROFILE=fast $(PYTEST) -m fast

explore: install
	end=$$(( $$(date +%s) + 60 * $(MINUTES) )); while [ $$(date +%s) -lt $$end ]; do \
	HYPOTHESIS_PROFILE=explore $(PYTEST) -m property || exit 1; done

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

speed: install
	$(BIN)/python benchmarks/speed.py

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:
	rm -rf .venv demo site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
