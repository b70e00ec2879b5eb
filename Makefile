# make install | demo | test | soak | bench | evaluate | evaluate-real | aot | lint | docs | clean          BACKEND=cpu (default) or cuda
BACKEND ?= cpu
PYTHON  ?= python3
# PyPI's torch brings several GB of CUDA; the CPU build comes from PyTorch's own index.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DOCS := build/docs-venv

.PHONY: install demo test soak bench evaluate evaluate-real aot lint docs clean

install: .venv/installed-$(BACKEND)

.venv/installed-cpu: requirements/cpu.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python {sys.version.split()[0]} found, 3.11 or later needed: make install PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) install -q --no-deps --retries 1 --extra-index-url $(CPU_INDEX) torch==2.13.0+cpu
	$(PIP) install -q --no-deps -r requirements/cpu.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	touch $@

.venv/installed-cuda: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(PIP) install -q -e '.[vllm,triton,test,bench,lint]'
	touch $@

# MODEL=smollm2, a folder or a GGUF file: with that chat model instead of the bundled one.
demo: install
	$(BIN)/python -m bench.$(if $(MODEL),demo_chat $(MODEL),demo)

# Two processes with a core each; the tests that share a server or a model stay together.
test: install
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# The server under kills, streams and fuzzing at full length; last its throughput after 1,000 edits.
soak: install
	$(BIN)/python -m pytest -m soak --soak
	$(BIN)/python -m bench.serving

bench: install
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds --results bench/results
	$(BIN)/python -m bench.rounding
	$(BIN)/python -m bench.report

evaluate: install
	$(BIN)/python -m bench.evaluate $(if $(COUNTERFACT),--counterfact $(COUNTERFACT)) $(if $(ZSRE),--zsre $(ZSRE))

# COUNTERFACT=FILE or ZSRE=FILE, both if there are; MODELS=smollm2,gemma3 PROSE=FILE N=100 ROWS=ours,LoRA
evaluate-real: install
	$(BIN)/python -m bench.real $(if $(MODELS),--models $(MODELS)) $(if $(COUNTERFACT),--set counterfact=$(COUNTERFACT)) \
	  $(if $(ZSRE),--set zsre=$(ZSRE)) $(if $(PROSE),--prose $(PROSE)) $(if $(N),-n $(N)) $(if $(ROWS),--rows $(ROWS))

# Needs cmake and a C compiler, neither a GPU nor a CUDA toolkit.
aot: install
	cmake -S . -B build-aot
	cmake --build build-aot
	ctest --test-dir build-aot --output-on-failure

lint: install
	$(BIN)/python -m compileall -q ultraedit_kernels integrations bench tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Pages of docs/ and of the docstrings, in build/docs. Reads the sources and imports nothing.
docs: $(DOCS)/installed
	$(DOCS)/bin/python -m mkdocs build --strict

$(DOCS)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' | xargs $(DOCS)/bin/python -m pip --disable-pip-version-check install -q
	touch $@

clean:
	rm -rf .venv build build-aot build-evaluate build-soak dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f ultraedit_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
