# These commands do everything on a machine that has only Python (3.11 or newer) and make:
#   make demo   trains an attention network on real digits and shows where it looks
#   make test   runs the checks and the tests, in about 10 minutes on two cores
#   make test-all   also runs the slow tests
#   make check  runs the linters, the types and a quick subset of the tests, in under 90 s
#   make docs   builds the documentation's site into build/site; a broken link or reference fails
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
QUICK := tests/test_house.py tests/test_import.py tests/test_recipes.py tests/test_losses.py \
	tests/test_evaluation.py tests/test_splits.py tests/test_overlay.py tests/test_preprocess.py

.PHONY: demo test test-all check docs clean
demo: $(VENV)/.installed
	$(BIN)/regard demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/pytest
	$(BIN)/pytest -n 2 -m "native and not slow"

test-all: test
	$(BIN)/pytest -m "slow and not native"
	$(BIN)/pytest -n 2 -m "slow and native"

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/pytest $(QUICK)

docs: $(VENV)/.installed-test
	$(BIN)/python scripts/make_docs.py

# A stamp file tells what is installed, so that the second time nothing is.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
