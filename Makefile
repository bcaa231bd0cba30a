# What a developer runs, each from a bare clone. `make` alone lists it.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
READY := .venv/ready
EXTRAS := demo,dev

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-optimized faults stress bench bandwidth soak gpu lint clean

help:
	@echo 'make setup    .venv with etha (editable) and what development needs; quick when nothing changed'
	@echo 'make demo     an agent, a trainer and an evaluator; options: make demo ARGS="--steps 1000"'
	@echo 'make test     ruff, mypy --strict and the tests'
	@echo 'make test-optimized  the same tests under python -O, where no assert of the library would count'
	@echo 'make lint     ruff and mypy alone'
	@echo 'make faults   the table of faults at small counts, and what must hold after each: minutes; needs strace'
	@echo 'make stress   the tests at their full counts: long'
	@echo 'make bench    what each operation costs, beside its bare floor: minutes; options: make bench ARGS="--only lease"'
	@echo 'make bandwidth  what handing over a model costs; options: make bandwidth ARGS="--device cuda:0 --plot"'
	@echo 'make soak     64 workers for two hours, and whether anything grows; options: make soak ARGS="--minutes 10 --plot"'
	@echo 'make gpu      all that a GPU is asked: probes, tests, bandwidth; under ten minutes; installs nothing'
	@echo 'make clean    remove builds and caches; .venv stays'

# Everything that an installation depends on, by content: times mean nothing after a clone or a checkout.
define SETUP
set -eu
identify='import sys; print(sys.version, sys.base_prefix)'
python="$$($(PYTHON) -c "$$identify")"
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo 'etha needs Python 3.11 or newer: make PYTHON=/path/to/python3.11' >&2; exit 1; }
wanted="$$(pwd) $$python $(EXTRAS) $$(cat pyproject.toml constraints.txt | sha256sum)"
if [ -x $(BIN)/python ] && [ "$$(cat $(READY) 2>/dev/null)" = "$$wanted" ]; then exit 0; fi
if [ "$$($(BIN)/python -c "$$identify" 2>/dev/null)" != "$$python" ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then
  $(PYTHON) -m venv --clear .venv
fi
rm -f $(READY)
echo 'make setup: installing what constraints.txt pins into .venv'
$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
printf '%s\n' "$$wanted" > $(READY)
endef
export SETUP

setup:
	@sh -c "$$SETUP"

demo: setup
	$(BIN)/etha demo $(ARGS)

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy --strict etha

test: lint
	$(BIN)/python -m pytest --durations=15 -m "not stress and not cuda" --ignore=tests/faults

# pytest says that asserts outside of test modules do not count; none is there (tests/test_optimized.py).
test-optimized: setup
	PYTHONOPTIMIZE=1 $(BIN)/python -m pytest -W "ignore:assertions not in test modules:pytest.PytestConfigWarning" \
	  -m "not stress and not cuda" --ignore=tests/faults $(ARGS)

faults: setup
	$(BIN)/python -m pytest -m "not stress" tests/faults $(ARGS)

stress: setup
	$(BIN)/python -m pytest -o faulthandler_timeout=7200 -m "stress and not cuda"

bench: setup
	$(BIN)/python benchmarks/latency.py $(or $(ARGS),--plot)

bandwidth: setup
	$(BIN)/python benchmarks/bandwidth.py $(or $(ARGS),--plot)

soak: setup
	$(BIN)/python benchmarks/soak.py $(or $(ARGS),--plot)

# Without `setup`: a GPU box may have no network, and its own torch is the one to ask.
gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) benchmarks/gpu.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find etha tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
