# Every target below sets up .venv by itself; all that is needed is make and Python 3.11 or newer.
#   PYTHON=python3.12      the interpreter that .venv is made from
#   PYTEST_ARGS="-k vote"  more options for `make test` and `make test-fast`
#   JOBS=4                 test processes at a time
PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
TORCH := $(shell grep '^torch==' constraints.txt)

# Left over from a caller's shell, these would make pip or Python look outside .venv.
unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_HASHES
# A launcher's variables must not reach the tests: they start process groups of their own.
unexport RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
# Many small processes share the cores; threads inside each would only fight over them.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast test-s3 test-quant engines layouts faults release service-full \
  bench bench-full bench-readme bench-peers lint fmt constraints clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv with the tested versions of everything

# torch goes first and alone, at the exact tested version: where a local CPU build of it is on
# offer, the exact pin is what lets pip choose it over a newer one with a GPU stack behind it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is not; set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[test,lint]'
	@touch $@

demo: $(STAMP) ## train, kill, resume, export and check, on this machine (about 4 minutes)
	$(BIN)/archon-lora demo --out demo-out

test: lint ## every check: lint, types, import contract, all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-fast: $(STAMP) ## the tests of one process that need no server
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal \
	  -m 'not dist and not s3 and not e2e and not slow' $(PYTEST_ARGS)

test-s3: $(STAMP) ## the S3 suite against the server that the AWS variables name (see docs/s3.md)
	@test -n "$$AWS_ENDPOINT_URL" && test -n "$$AWS_ACCESS_KEY_ID" \
	  && test -n "$$AWS_SECRET_ACCESS_KEY" || { echo "Set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID" \
	  "and AWS_SECRET_ACCESS_KEY (AWS_CA_BUNDLE, CKPT_TEST_BUCKET): docs/s3.md" >&2; exit 1; }
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 's3 and not e2e' $(PYTEST_ARGS)

# Real servers of vLLM and SGLang for the CPU; they take 5 GB and are installed once.
engines: ENGINES ?= $(CURDIR)/.engines
engines: $(STAMP) ## vLLM and SGLang installed, started and handed versions (see docs/engines.md)
	PYTHON=$(PYTHON) tests/engines/install.sh $(ENGINES)
	$(BIN)/archon-lora make-tiny $(ENGINES)/model --hidden 128
	ENGINES=$(ENGINES) CKPT_TEST_ENGINE_MODEL=$(ENGINES)/model \
	  CKPT_TEST_VLLM_START=tests/engines/start-vllm.sh \
	  CKPT_TEST_SGLANG_START=tests/engines/start-sglang.sh \
	  CKPT_TEST_VLLM_PYTHON=$(ENGINES)/vllm/bin/python \
	  $(BIN)/python -m pytest -s tests/compat/test_vllm.py tests/compat/test_vllm_plugin.py \
	  tests/compat/test_sglang.py tests/compat/test_lint_engines.py tests/compat/test_two_engines.py \
	  tests/compat/test_rl_engines.py $(PYTEST_ARGS)

layouts: $(STAMP) ## every layout of ranks against every other (make test takes a sample; about 15 minutes)
	ARCHON_LAYOUTS=full $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --timeout 3600 \
	  tests/distributed/test_tensor_parallel.py tests/distributed/test_engine_layouts.py \
	  tests/distributed/test_layouts.py tests/distributed/test_expert_parallel.py \
	  tests/distributed/test_areal.py $(PYTEST_ARGS)

faults: $(STAMP) ## every cell of the fault matrix (make test takes a sample; about 20 minutes)
	CKPT_FAULTS=full $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --timeout 1800 \
	  tests/faults tests/property $(PYTEST_ARGS)

# Without these packages, which are in no other target, `make test` skips the tests that need them.
test-quant: $(STAMP) ## adapters over bases that torchao and bitsandbytes quantised
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[quant]'
	$(BIN)/python -m pytest tests/unit/archon_lora/test_quantised.py $(PYTEST_ARGS)

service-full: $(STAMP) ## every cell of the service's tests: kills, requests made from the schema, 500 long polls
	CKPT_FAULTS=full CKPT_SERVICE=full $(BIN)/python -m pytest -n $(JOBS) --dist worksteal \
	  tests/faults/test_service_sigkill.py tests/contract/test_service_api.py \
	  tests/contract/test_service_load.py $(PYTEST_ARGS)

release: $(STAMP) ## the wheel from the source archive, installed into an empty environment
	CKPT_TEST_RELEASE=1 $(BIN)/python -m pytest tests/e2e/test_release.py tests/e2e/test_installed.py \
	  --timeout 2400 $(PYTEST_ARGS)

bench: $(STAMP) bench-peers ## the figures of the README, measured here (under 10 minutes)
	$(BIN)/python -m benchmarks

bench-full: $(STAMP) bench-peers ## the same, and how they grow with bytes, tensors and ranks
	$(BIN)/python -m benchmarks --full

bench-readme: $(STAMP) ## put the newest figures into the README
	$(BIN)/python -m benchmarks --readme README.md

# What cannot be installed is named in the results as not measured; nothing else needs it.
bench-peers: $(STAMP)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[bench]'
	-test -d benchmarks/.peers/torchtune || $(BIN)/python -m pip install --quiet --no-deps \
	  --disable-pip-version-check --target benchmarks/.peers -r benchmarks/torchtune.txt

lint: $(STAMP) ## style, format, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(STAMP) ## format the code, mend what can be mended by rule, write docs/api.md anew
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/make_api.py

constraints: $(STAMP) ## write constraints.txt anew from what .venv holds
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable \
	  | sed 's/+.*//'; } > constraints.new
	mv constraints.new constraints.txt

clean: ## remove .venv and everything that was generated
	rm -rf $(VENV) benchmarks/.peers demo-out build dist *.egg-info .coverage* \
	  .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
