# Everything here sets up what it needs by itself; a second call reuses it. Needs Python 3.10-3.12 (`make PYTHON=python3.11 demo` to choose).
PYTHON ?= python3
BIN := .venv/bin
# One thread a process: on a busy machine torch's thread pool is many times slower than two processes of one thread each.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
# Two at a time; whoever is done first takes from the other.
PYTEST := $(BIN)/pytest -n 2 --dist worksteal

.PHONY: help demo test bench eval figures costs export exercises site site-test clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

.venv/core: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"relax needs Python 3.10, 3.11 or 3.12, $(PYTHON) is {v[0]}.{v[1]}; choose one: make PYTHON=python3.11")'
	@echo "Setting up .venv (once; some minutes, mostly the download of torch)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

.venv/all: .venv/core
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,trl,gpu,eval]'
	@touch $@

.venv/site: .venv/core
	$(BIN)/pip install -q -c constraints.txt -e '.[site]'
	@touch $@

demo: .venv/core  ## train GRPO, ReLaX and two controls (uniform KL, half the learning rate) on this machine's processor, and draw figures/demo_live.png
	@$(BIN)/python -m relax.demo $(if $(FRESH),--fresh)

test: .venv/all  ## notebooks, their solutions, pytest, and that modules and README are what the notebooks say
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(PYTEST)

exercises: .venv/all  ## of these the folded solutions alone, each after the cells that it depends on
	$(PYTEST) -m exercises --durations=5

bench: .venv/all  ## ratios of speed, written to data/bench.json
	$(BIN)/python -m relax.bench

eval: .venv/all  ## score a model on benchmarks: MODEL=... BENCH=math500,amc23 (or paper) K=32 ARGS="--placement user"; stops and goes on
	@$(BIN)/python -m relax.benchmarks $(if $(MODEL),--model "$(MODEL)") $(if $(BENCH),--bench "$(BENCH)") $(if $(K),--k $(K)) $(ARGS)

export: .venv/all  ## modules and README from the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python -c 'from relax.record import write_readme; write_readme()'

figures: .venv/all  ## redraw all figures and tables from the recorded runs, and join their findings into README
	$(BIN)/python -m relax.demo --recorded
	$(BIN)/nbdev_test --path nbs/paper --n_workers 2
	$(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace nbs/index.ipynb
	$(BIN)/nbdev_clean --fname nbs/index.ipynb
	$(BIN)/python -c 'from relax.record import write_readme; write_readme()'

site: .venv/site  ## the book as a static site, from stored outputs, into site/_build/html
	@$(BIN)/python -W ignore site/build.py

site-test: .venv/all site  ## drive the built site in a browser (needs chromium); screenshots go to site/_build/screenshots
	@$(BIN)/pip install -q -c constraints.txt -e '.[browser]'
	$(BIN)/pytest -m browser

costs: .venv/all  ## time and memory of every notebook, written to data/notebooks.json
	$(BIN)/python -c 'from relax.record import measure_costs; measure_costs()'

clean:  ## throw the environment and the built site away
	rm -rf .venv site/_build
