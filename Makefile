# prefixkit: `make demo` trains a prefix on real reviews; `make test` runs the checks. Both set up everything first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PY := .venv/bin/python
# Tests use few threads: two OpenMP threads fighting for a busy core are slower than one.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# The oldest and the newest transformers that pyproject.toml allows.
OLDEST := 5.23.0
NEWEST := 5.24.0
MODEL_TESTS := tests/conformance tests/injection tests/methods tests/prefix tests/models tests/classification tests/training

.PHONY: demo test test-slow test-all test-notebooks notebooks test-quantised test-ray test-oldest test-newest bench lint setup format clean

demo: setup
	@$(PY) -m prefixkit train positive-reviews --resume

test: setup lint
	@$(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not slow"

# More of the same: other families of models, other methods, more processes. About as long again.
test-slow: setup
	@$(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m slow

test-all: test test-slow

# The notebooks from top to bottom, each on a kernel of its own, on a tiny random model. Other languages have the same code.
test-notebooks: setup
	@$(OFFLINE) OMP_NUM_THREADS=1 PREFIXKIT_NOTEBOOK_SIZE=tiny $(PY) -W ignore -m pytest -n 2 --nbmake \
	  -p no:cacheprovider -o addopts=-q -o filterwarnings= -o timeout=900 notebooks/*.ipynb

# The same at teaching size, what they show saved in the files: about a quarter of an hour on two cores.
notebooks: setup
	@$(OFFLINE) $(PY) notebooks/execute.py

# Bases quantised by torchao and bitsandbytes, laid over .venv: every import of torchao writes to stderr.
test-quantised: setup
	@rm -rf .versions/$@
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target .versions/$@ \
	  $$(grep -E '^(torchao|bitsandbytes)==' constraints.txt)
	@$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=.versions/$@ $(PY) -m pytest -n 2 --dist worksteal \
	  tests/injection/test_quantised.py tests/models/test_quantised_folders.py

# Sweeps and studies on Ray, laid over .venv with what Ray needs.
test-ray: setup
	@rm -rf .versions/$@
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target .versions/$@ \
	  $$(grep -E '^(ray|attrs|jsonschema|jsonschema-specifications|msgpack|protobuf|referencing|rpds-py)==' constraints.txt)
	@$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=.versions/$@ $(PY) -m pytest tests/lab/sweep/test_sweep_on_ray.py tests/lab/study/test_on_ray.py

# The oldest transformers the project allows, and the newest, laid over .venv, against all that touches a model.
test-oldest test-newest: setup
	@rm -rf .versions/$@
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target .versions/$@ \
	  "transformers==$(if $(findstring oldest,$@),$(OLDEST),$(NEWEST))"
	@$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=.versions/$@ $(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(MODEL_TESTS)

# Speed and memory beside PEFT, LoRA and full fine-tuning, and of many prefixes; fails where a goal is missed.
# Nothing else should be running.
bench: setup
	@$(PY) benchmarks/resident.py --out .bench/resident.json; many=$$?; \
	  $(PY) benchmarks/speed.py --out .bench/speed.json; fast=$$?; \
	  $(PY) benchmarks/time_to_quality.py .bench/speed.json && exit $$((many + fast))

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -c "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"

format: setup
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

setup: .venv/ready

# torch first: its CPU build satisfies everyone else's range, so no CUDA build is pulled in behind it.
.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv (once; a few minutes)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch .venv/ready

clean:
	rm -rf .venv .versions .bench .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
