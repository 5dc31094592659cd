# Bare `make` lists the targets. Everything happens in .venv; PYTHON is only used to make it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo app test lint ui gpu tiny-sdxl tiny-sd15 address clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1	\2/' | expand -t 20

$(BIN)/t2ilib: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	@echo "installing into $(VENV): a few minutes the first time"
	$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt -e '.[dev]'
	@touch $@

install: $(BIN)/t2ilib  ## Make .venv and install the project with the tested versions
	@echo "installed. Next:"
	@echo "  source $(VENV)/bin/activate     enter the environment; then t2ilib, jupyter and mlflow are found"
	@echo "  t2ilib --help                   what it can do"
	@echo "  make demo                       a study on drawn pictures, a few minutes"

demo: $(BIN)/t2ilib  ## Run the adapters study in its quick preset and write its report
	$(BIN)/t2ilib -q study run experiments/adapters.yaml --preset quick --jobs $(JOBS)

app: $(BIN)/t2ilib  ## Open the app, which draws with the adapters under results (loopback only)
	@$(BIN)/python -c 'import gradio' 2>/dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[app]'
	$(BIN)/t2ilib app

test: $(BIN)/t2ilib  ## Run the test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L | grep -q GPU; then $(BIN)/python -m pytest -m gpu; fi

lint: $(BIN)/t2ilib  ## Check style, and that notebooks are committed without outputs
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify experiments/*.ipynb inference/*.ipynb

ui: $(BIN)/t2ilib  ## Open the MLflow UI on what was logged (loopback only)
	$(BIN)/t2ilib ui

gpu: $(BIN)/t2ilib  ## Check, time and measure on the GPU of this machine (at most 8 minutes), into results/gpu
	$(BIN)/python experiments/benchmarks/gpu.py

tiny-sdxl: $(BIN)/t2ilib  ## Train the tiny SDXL anew, all stages (about two hours on 2 cores)
	$(BIN)/t2ilib tiny build work/tiny-sdxl/start
	for stage in vae vae-whole clip unet clip-again unet-again; do $(BIN)/t2ilib train experiments/tiny-sdxl/$$stage.yaml || exit 1; done
	$(BIN)/t2ilib tiny pack work/tiny-sdxl t2ilib/models/weights/tiny-sdxl

tiny-sd15: $(BIN)/t2ilib  ## Train the tiny SD1.5 anew (about an hour on 2 cores)
	$(BIN)/t2ilib train experiments/tiny-sd15/unet.yaml
	$(BIN)/t2ilib tiny pack work/tiny-sd15 t2ilib/models/weights/tiny-sd15 --model tiny-sd15

address:  ## Write the repository's public address where notebooks and pip look: make address URL=https://github.com/OWNER/NAME
	@case "$(URL)" in https://*) ;; *) echo "give the address: make address URL=https://github.com/OWNER/NAME"; exit 2;; esac
	sed -i.old 's|^    "ADDRESS = \\"[^"]*\\"|    "ADDRESS = \\"git+$(URL)\\"|' experiments/*.ipynb inference/*.ipynb
	sed -i.old -e '/^\[project\.urls\]/,/^$$/d' -e 's|^\[project\.scripts\]|[project.urls]\nRepository = "$(URL)"\n\n[project.scripts]|' pyproject.toml
	sed -i.old -e '/^\[!\[Open in /d' -e 's|^<!-- badges.*|&\n[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/$(URL:https://github.com/%=%)/blob/main/experiments/train.ipynb)\n[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=$(URL)/blob/main/experiments/train.ipynb)|' README.md
	rm -f experiments/*.ipynb.old inference/*.ipynb.old pyproject.toml.old README.md.old

clean:  ## Remove .venv and caches; results and work stay
	rm -rf $(VENV) .pytest_cache .ruff_cache
