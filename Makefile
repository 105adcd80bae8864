# Every target but gpu, which takes the python it is given, does its own set-up: a fresh clone needs Python 3.11+ and make.
# Another interpreter: make env PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DRIVER := $(VENV)/.browser
TRITON := $(VENV)/.triton
RAY := $(VENV)/.ray
TOUR := data/runs/tour
DISTILL := 0
FIND_CHROMIUM := for name in "$$CHROMIUM" chromium chromium-browser google-chrome; do command -v "$$name" && break; done >/dev/null
NO_CHROMIUM := make browser needs Chromium or Chrome: install it (Debian: sudo apt-get install chromium), or name it (CHROMIUM=/path/to/it make browser)

.DEFAULT_GOAL := help
.PHONY: help env demo test kernels cluster gpu browser lab notebooks tables bench

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## create .venv with everything pinned (about 1.6 GB, a few minutes, once)

demo: $(STAMP)  ## the main job: quantize the bundled model to 2 bits, calibrate, sample, evaluate; DISTILL=1000 adds the last stage
	@mkdir -p $(TOUR)
	$(BIN)/papermill --cwd notebooks --progress-bar -p distillation $(DISTILL) notebooks/00_tour.ipynb $(TOUR)/00_tour.ipynb
	@cat $(TOUR)/summary.txt

test: $(STAMP)  ## linter, formatter, all tests but those in a browser, on a cluster and of the CUDA kernels
	$(BIN)/ruff check vqlib tests benchmarks
	$(BIN)/ruff format --check vqlib tests benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n logical --maxprocesses 8 --dist worksteal

kernels: $(TRITON)  ## CUDA without a GPU: kernels in Triton's interpreter, the chain on a pretend device (Linux, 0.7 GB more)
	$(BIN)/python -m pytest tests/kernels/test_kernels_cuda.py tests/gpu -n logical --maxprocesses 8 --dist worksteal

cluster: $(RAY)  ## studies on Ray: a cluster of two small nodes on this machine, killed workers and all (0.25 GB more)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster

gpu:  ## everything that only a GPU can show, in about seven minutes, with torch for CUDA (.venv's, or that of PYTHON)
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py

browser: $(DRIVER)  ## the notebooks in a real JupyterLab (wants Chromium; as root on Debian it is installed)
	@$(FIND_CHROMIUM) || { test "$$(id -u)" = 0 && command -v apt-get; } >/dev/null || { echo '$(NO_CHROMIUM)' >&2; exit 1; }
	@$(FIND_CHROMIUM) || { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium; }
	$(BIN)/python -m pytest tests/browser -n logical --maxprocesses 2 --dist loadfile

lab: $(STAMP)  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=. notebooks/00_tour.ipynb

notebooks: $(STAMP)  ## execute every notebook with small parameters
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_notebooks.py -n logical --maxprocesses 8

tables: $(STAMP)  ## the main table, methods × bits × steps, resumable (2 to 5 hours on two cores)
	$(BIN)/python -m vqlib.studies.main_table

bench: $(STAMP)  ## speed as ratios to a peer or a floor, on DiT-XL/2's geometry (assignment wants faiss-cpu and scikit-learn)
	$(BIN)/python benchmarks/bench_assignment.py --threads 2
	$(BIN)/python benchmarks/bench_codebooks.py --threads 2
	$(BIN)/python benchmarks/bench_feedback.py --threads 2
	$(BIN)/python benchmarks/bench_calibration.py --model dit-mini-fashion --batch 16 --iterations 40 --floors 20 --threads 2
	$(BIN)/python benchmarks/bench_calibration.py --batch 2 --iterations 20 --resume --estimate --threads 2
	$(BIN)/python benchmarks/bench_inference.py speed --threads 2
	$(BIN)/python benchmarks/bench_evaluation.py --threads 2
	@test ! -e $(DRIVER) || $(BIN)/python benchmarks/bench_browser.py --threads 2

# torch comes first and pinned, so that nothing else decides which build of it is installed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"vqlib needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]} (choose another: make env PYTHON=python3.12)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[notebooks,test,baselines]'
	$(BIN)/python vqlib/system/startup.py
	@touch $@

# A CUDA build of torch has it; beside a CPU build only these tests need it.
$(TRITON): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt triton
	@touch $@

$(RAY): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[cluster]'
	@touch $@

$(DRIVER): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[browser]'
	@touch $@
