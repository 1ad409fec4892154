# Two commands do everything: `make quickstart` and `make test`. Both create the environment if it is missing.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PY = $(VENV)/bin/python
READY = $(VENV)/.ready

.PHONY: quickstart quickstart-ppo test lint clean

# DAPO with IB regularisation on the embedded engine, on a CPU. ARGS go to the training command,
# e.g. make quickstart ARGS="--seed_everything 2".
quickstart: runs/sft_quickstart/model/config.json
	$(PY) -m ibro_lightning fit --config quickstart.yaml $(ARGS)

# The same task with PPO and a critic.
quickstart-ppo: runs/sft_quickstart/model/config.json
	$(PY) -m ibro_lightning fit --config quickstart_ppo.yaml $(ARGS)

# The base policy is trained once, and kept.
runs/sft_quickstart/model/config.json: | $(READY)
	$(PY) -m ibro_lightning fit --config sft_quickstart.yaml

test: $(READY) lint
	$(PY) -m pytest -n 2

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# torch first and by its pin: asked for through another package, a looser range would pull in another build.
$(READY): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade "pip>=24"
	$(PY) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache dist
