# Each target sets up all it needs. VENV=path to use another environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: reproduce test lint format bench docs readme clean

reproduce: $(VENV)/.paper  ## the paper's effect on handwritten digits, with a report
	$(BIN)/batchrenorm reproduce digits

test: $(VENV)/.dev  ## all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(VENV)/.dev  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.bench  ## speed against nn.BatchNorm and the peers
	$(BIN)/python -m benchmarks run

docs: $(VENV)/.docs  ## the site, in site/: no network, and a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

SOURCES_OF_LIBRARY := hatch_build.py $(wildcard src/batchrenorm/*.c src/batchrenorm/backends/native*.[ch])

$(VENV)/.%: pyproject.toml constraints.txt $(SOURCES_OF_LIBRARY)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[$(if $(filter dev,$*),paper$(comma)dev,$*)]'
	touch $@

comma := ,

readme:  ## tables of README.md, EXPERIMENTS.md, BENCHMARKS.md, plots and report, from the committed results
	for preset in digits omniglot fashion-mnist; do \
	  $(BIN)/batchrenorm report results/$$preset --output results/report.html >/dev/null || exit; done
	$(BIN)/batchrenorm report results/digits --into README.md
	$(BIN)/batchrenorm report results/omniglot results/fashion-mnist --into EXPERIMENTS.md
	$(BIN)/batchrenorm report results/digits results/omniglot results/fashion-mnist --predictions --into EXPERIMENTS.md
	$(BIN)/batchrenorm report results/omniglot results/fashion-mnist results/digits --output results/report.html
	$(BIN)/python -m benchmarks table --headline --into README.md
	$(BIN)/python -m benchmarks table --into BENCHMARKS.md
	$(BIN)/python -m benchmarks plot

clean:
	rm -rf $(VENV) runs site
