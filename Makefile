# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types torture mutants package kernels-aot fp4-oracles gguf-oracle mlx-oracles site clean

demo: $(READY)  ## write a small K2, take it through every format and back, check every step
	$(BIN)/k2quant demo demo-run

test: $(READY)  ## the tests, as CI runs them
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist loadfile  # threads that wait leave the core to the other process

lint: $(READY)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

types: $(READY)  ## strict types
	$(BIN)/mypy

torture: $(READY)  ## kill a conversion at 50 random points and compare what the resumed runs write
	K2QUANT_KILLS=50 $(BIN)/pytest tests/k2quant/conversion/test_kill.py
	K2QUANT_KILLS=50 K2QUANT_TO=nvfp4 $(BIN)/pytest tests/k2quant/conversion/test_kill.py -k at_random

mutants: $(READY)  ## change the rules one place at a time and see that a test notices; MODULE=k2quant/checkpoint/header.py SAMPLE=20
	$(BIN)/pip install --quiet --constraint constraints-dev.txt --editable ".[mutants]"
	$(BIN)/python scripts/mutants.py $(MODULE) $(if $(SAMPLE),--sample $(SAMPLE))

package: $(READY)  ## build wheel and sdist, install the wheel alone elsewhere, then each extra, and do what each promises
	$(BIN)/python scripts/check_package.py

kernels-aot: $(READY)  ## compile every shipped kernel configuration for three GPU architectures and gate the results
	$(BIN)/python benchmarks/kernels_aot.py

fp4-oracles:  ## ask ModelOpt, in an environment of its own, what NVFP4 of some matrices is, and keep it for the tests
	$(PYTHON) -m venv build/modelopt
	build/modelopt/bin/pip install --quiet --constraint constraints-dev.txt nvidia-modelopt==0.47.0 requests huggingface-hub  # it imports both unasked
	build/modelopt/bin/python benchmarks/suites/fp4/oracles.py tests/data/golden_modelopt_nvfp4.json

gguf-oracle: $(READY)  ## ask llama.cpp, built in an environment of its own, about exports of small models, and keep it for the tests; NANO=FOLDER: of a trained nano-K2 too
	$(PYTHON) -m venv build/llama
	build/llama/bin/pip install --quiet --constraint constraints-dev.txt llama-cpp-python==0.3.36  # built here by a C++ compiler, for many minutes
	PYTHONPATH=tests/shared:benchmarks $(BIN)/python benchmarks/suites/exports/gguf_oracle.py build/llama/bin/python tests/data/golden_llama_cpp.json $(NANO)

mlx-oracles: $(READY)  ## ask mlx-lm, in an environment of its own, what it loads of small checkpoints and their exports; keep it for the tests
	$(BIN)/python benchmarks/suites/exports/mlx_sources.py build/mlx-sources
	$(PYTHON) -m venv build/mlx
	build/mlx/bin/pip install --quiet --constraint constraints-dev.txt "mlx[cpu]==0.32.4" mlx-lm==0.32.2
	build/mlx/bin/python benchmarks/suites/exports/mlx_oracles.py build/mlx-sources tests/data/golden_mlx.json

site: $(READY)  ## the documents as a site in build/site; a warning is an error
	$(BIN)/pip install --quiet --constraint constraints-dev.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf demo-run build dist *.egg-info

$(READY): pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints-dev.txt --editable ".[dev]"
	touch $(READY)
