# Each target does all of its own set-up: see scripts/setup.
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH):/usr/sbin
PY := .venv/bin/python
STAMP := .venv/.ready
TEST_STAMP := .venv/.ready-test
WORKERS ?= 2

.PHONY: setup demo test check fmt bench soak deb screenshots clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup
	scripts/setup
	@touch $@

$(TEST_STAMP): $(STAMP) scripts/setup-test
	scripts/setup-test
	@touch $@

demo: $(STAMP)  ## ten real agents, a real broker: train on Boston Housing, show it, leave out/demo/report.html
	@mkdir -p out/demo
	.venv/bin/sordino-sim run examples/boston-fedavg.yaml --transport processes \
		--set train.join_s=60 --report out/demo
	@echo "report: out/demo/report.html   summary: out/demo/summary.json"

test: $(TEST_STAMP)  ## everything, a real broker included
	SORDINO_REQUIRE_MQTT=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal

check: $(TEST_STAMP)  ## lint, types, layers, and the tests that are not slow
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pyright
	.venv/bin/lint-imports
	SORDINO_REQUIRE_MQTT=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow"

fmt: $(STAMP)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: $(STAMP)  ## ratios and exact counts; benchmarks/README.md says how to read them
	@set -e; for script in benchmarks/bench_*.py benchmarks/spdz.py benchmarks/tensors.py; do echo "== $$script"; $(PY) $$script; done
	$(PY) benchmarks/spdz.py --products

man: $(STAMP)  ## manual pages into out/man; read one with: man -l out/man/sordino.1
	$(PY) scripts/make-man out/man

soak: $(TEST_STAMP)  ## the full trial counts that `make test` only samples
	SORDINO_REQUIRE_MQTT=1 SORDINO_SOAK=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m soak

deb: $(STAMP)  ## Debian packages in out/: the agent for arm64 and amd64, the server for this machine
	$(PY) packaging/build_deb.py sordino-agent --arch arm64
	$(PY) packaging/build_deb.py sordino-agent --arch amd64
	$(PY) packaging/build_deb.py sordino-server --arch $$(dpkg --print-architecture)

screenshots: $(TEST_STAMP)  ## docs/images again, of a simulated run
	$(PY) docs/make_screenshots.py

clean:
	rm -rf .venv out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
