# The set-up of everything: each target makes .venv, installs the pinned requirements and builds the C++ kernels in
# place. Where python3 has torch >= 2.11 already (a GPU machine without network) it is used as it is.
.PHONY: help build test demo bench lint format gpu clean

HAS_TORCH := $(shell python3 -c "from importlib.metadata import version as v; \
	print(tuple(map(int, v('torch').split('+')[0].split('.')[:2])) >= (2, 11))" 2>/dev/null)
ifeq ($(HAS_TORCH),True)
PYTHON := python3
FORMAT_CPP := clang-format
else
PYTHON := .venv/bin/python
FORMAT_CPP := .venv/bin/clang-format
ENVIRONMENT := .venv/installed
endif
export PYTHONPATH := $(CURDIR)

help:
	@echo "make test | demo | bench | lint | format | build | clean"

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

build: $(ENVIRONMENT)
	$(PYTHON) setup.py --quiet build_ext --inplace

test: build
	$(PYTHON) -m pytest

demo: build
	$(PYTHON) examples/demo.py $(ARGS)

bench: build
	$(PYTHON) benchmarks/cpu.py $(ARGS)

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(FORMAT_CPP) --dry-run --Werror csrc/*.h csrc/*.cpp tests/*.cpp

format: $(ENVIRONMENT)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(FORMAT_CPP) -i csrc/*.h csrc/*.cpp tests/*.cpp

gpu:
	@echo "this version has no GPU kernels; 'make test' tests what there is" && false

clean:
	rm -rf build .venv topk_fast/*.so *.egg-info
