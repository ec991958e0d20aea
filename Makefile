# prunebench: everything a clone can do. `make` alone says what there is.
# The papers' models are large: ONLY="model=llama2-7b sparsity=2:4" chooses cells of a recipe.
# On a machine without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes.

PYTHON ?= python3
VENV ?= .venv
ONLY ?=
TORCH_INDEX ?=
RESULTS ?= reproduced
DEMO ?= demo
DEMO_GEMMA ?= demo-gemma
GPU_JSON ?= benchmarks/gpu.json
BIN := $(VENV)/bin
RUN := $(BIN)/prunebench run --calibration c4@wheel --within-block sequential --results-dir $(DEMO)
RUN_GEMMA := $(BIN)/prunebench run --model gemma3-270m-q4 --calibration c4@wheel --ppl wiki@wheel --results-dir $(DEMO_GEMMA)
LEARN := $(BIN)/prunebench run --method maskllm --sparsity 2:4 --calibration c4@wheel --calibration-samples 32 --seqlen 512 --ppl-seqlen 512

REPRODUCE := $(addprefix reproduce-,laptop allocation domain equal-bytes gemma recovery wanda sparsegpt gblm alps scheduler maskllm maskllm-laptop zeroshot wikitext2)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-gemma test test-real test-browser test-cluster lint check docs site bench gpu-acceptance gpu-acceptance-report clean reproduce-transfer $(REPRODUCE)

help:  ## say what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 32

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install -q -c constraints.txt torch --index-url $(TORCH_INDEX))
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,report]'
	touch $@

install: $(BIN)/.installed  ## make the environment in .venv

demo: install  ## prune the default model by magnitude and Wanda, show what that cost (4 minutes)
	$(BIN)/prunebench models fetch smollm2-135m-q4
	$(RUN) --method dense
	$(RUN) --method magnitude --sparsity 0.5
	$(RUN) --method magnitude --sparsity 2:4
	$(RUN) --method wanda --sparsity 0.5
	$(RUN) --method wanda --sparsity 2:4
	$(BIN)/prunebench compare --results-dir $(DEMO)

demo-gemma: install  ## the same with Gemma 3 270M (238 MB; fetching it accepts https://ai.google.dev/gemma/terms)
	$(BIN)/prunebench models fetch gemma3-270m-q4
	$(RUN_GEMMA) --method dense
	$(RUN_GEMMA) --method magnitude --sparsity 0.5
	$(RUN_GEMMA) --method magnitude --sparsity 2:4
	$(RUN_GEMMA) --method wanda --sparsity 0.5
	$(RUN_GEMMA) --method wanda --sparsity 2:4
	$(BIN)/prunebench compare --results-dir $(DEMO_GEMMA)

# bytecode is kept whatever the environment says: the many processes of the tests would compile it again
test test-real test-browser test-cluster: export PYTHONDONTWRITEBYTECODE :=

test: install  ## the default tests: no network, no GPU
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup

test-real: install  ## the slow tests, and those on the real default model and real text
	$(BIN)/python -m pytest -q -n auto --maxprocesses 2 --dist loadgroup --durations 25 -m "real or slow"

test-browser: install  ## the report in a real browser (needs Chromium and chromedriver)
	$(BIN)/python -m pytest -q -m browser

test-cluster: $(BIN)/.cluster  ## sweeps on a local Ray cluster and on submitit (installs both)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m cluster

$(BIN)/.cluster: $(BIN)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[slurm,ray]'
	touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## format, lint, types and the default tests

docs: install  ## write docs/cli.md and the defaults of options from the code, and the README table from the results
	$(BIN)/python docs/generate.py

site: $(BIN)/.site  ## the README and docs as a site in build/site (installs mkdocs-material)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/.site: $(BIN)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $@

bench: install  ## measure every promised figure (ONLY=name for some)
	$(BIN)/python -m benchmarks --only "$(ONLY)"

gpu-acceptance: install  ## what is promised on a GPU, on one GPU, nine minutes (ONLY=part, GPU_JSON=file)
	$(BIN)/python -m benchmarks.gpu_acceptance $(GPU_JSON) --only "$(ONLY)"

gpu-acceptance-report: install  ## the table of the last make gpu-acceptance, against what is promised
	$(BIN)/python -m benchmarks.gpu_acceptance.report $(GPU_JSON)

reproduce-laptop:  ## the one-shot methods on the default model, an hour on two cores (RESULTS=folder)
reproduce-allocation:  ## how the ratio is spread over the layers, on the default model, an hour and a half
reproduce-domain:  ## two methods, calibrated on two texts and scored on both, on the default model
reproduce-equal-bytes:  ## pruned, quantized, both, and fewer blocks: quality beside bytes, on the default model
reproduce-gemma:  ## four methods, as pruned and recovered, on Gemma 3 270M (238 MB, Gemma's terms)
reproduce-recovery:  ## recovery after pruning (ONLY="model=smollm2-135m-q4" needs no hub: hours on two cores)
reproduce-zeroshot:  ## 500 questions a task, dense and eight rows, on the default model (hours on two cores)
reproduce-wikitext2:  ## the whole test set of WikiText-2, on the default model (hours on two cores, the hub)
reproduce-wanda:  ## the tables of the paper: this and the next five need a GPU and the hub
reproduce-sparsegpt:  ## the tables of the paper (ONLY="model=opt-125m" chooses cells)
reproduce-gblm:  ## the table and the model zoo of the paper
reproduce-alps:  ## the tables of the paper
reproduce-scheduler:  ## the claims of the paper; its tables are not public
reproduce-maskllm:  ## the published masks of the paper
reproduce-maskllm-laptop:  ## learned masks on the default model, three seeds and ablations (hours)
$(REPRODUCE): reproduce-%: install
	$(BIN)/prunebench sweep recipes/$*.toml $(ONLY) --results-dir $(RESULTS)

reproduce-transfer: install  ## a learned mask for C4, and one for Wikipedia that begins with it (half an hour)
	mkdir -p $(RESULTS)
	$(LEARN) --ppl wiki@wheel --save-masks $(RESULTS)/general.npz --force --results-dir $(RESULTS)
	$(LEARN) --ppl wiki@wheel,c4@wheel --set prior=$(RESULTS)/general.npz --set train_data=wiki@wheel --results-dir $(RESULTS)

clean:  ## remove the environment and caches of tools (not results, not downloads)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -prune -exec rm -rf {} +
