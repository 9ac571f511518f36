# The set-up of everything: each target makes .venv, installs the pinned requirements and builds the C++ kernels in
# place. Where python3 has torch >= 2.11 already (a GPU machine without network) it is used as it is. With TORCH=2.11.0,
# or TORCH=newest, a target has an environment of its own with that torch and the newest of all else.
.PHONY: help build test test-fast docs demo study bench bench-full tables lint format gpu cuda-host wheel test-wheel release-notes clean

HAS_TORCH := $(shell python3 -c "from importlib.metadata import version as v; \
	print(tuple(map(int, v('torch').split('+')[0].split('.')[:2])) >= (2, 11))" 2>/dev/null)
ifdef TORCH
PYTHON := .venv/torch-$(TORCH)/bin/python
ENVIRONMENT := .venv/torch-$(TORCH)/installed
else ifeq ($(HAS_TORCH),True)
PYTHON := python3
FORMAT_CPP := clang-format
else
PYTHON := .venv/bin/python
FORMAT_CPP := .venv/bin/clang-format
ENVIRONMENT := .venv/installed
endif
export PYTHONPATH := $(CURDIR)
SHELL := /bin/bash

help:
	@echo "make test | test-fast | docs | demo | study | bench | bench-full | tables | gpu | cuda-host | lint | format | build | wheel | test-wheel | clean"

.venv/installed: requirements.txt
	python3 -m venv .venv
	echo $(CURDIR) > $$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/topk_fast_checkout.pth
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	# Apart, for the test of timm's snippet alone: its torchvision, beside a CPU build of torch, breaks others' imports.
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/timm \
	  timm==1.0.31 torchvision==0.28.0
	touch $@

.venv/torch-%/installed: pyproject.toml
	python3 -m venv .venv/torch-$*
	.venv/torch-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	.venv/torch-$*/bin/python -m pip install --quiet "torch$(patsubst %,==%,$(filter-out newest,$*))" \
	  "setuptools>=77" ninja --group test --group benchmarks --group examples
	touch $@

# V=1 shows the compiler's lines; without it they are in build/log, and shown if the build fails.
build: $(ENVIRONMENT)
	@mkdir -p build
	@$(PYTHON) setup.py --quiet build_ext --inplace $(if $(V),,> build/log || { cat build/log; exit 1; })

# With pytest-xdist a worker for each core takes whole files, whose fixtures are then made once, in conftest.py's order.
PARALLEL = $$($(PYTHON) -c "import xdist; print('-n auto --dist loadfile --no-loadscope-reorder')" 2>/dev/null)
test: build
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PARALLEL)

# Eager code and the noise contract, on the backends of the CPU: what a change breaks first.
test-fast: build
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PARALLEL) -m "not slow" tests/api tests/contract tests/kernels/test_backends.py

# The site of the pages and the docstrings. A warning fails the build, and a link that leads nowhere is one.
docs: $(ENVIRONMENT)
	$(PYTHON) -m sphinx --quiet --fresh-env --fail-on-warning -c docs -d build/doctrees . build/site

demo: build
	$(PYTHON) -m examples.demo $(ARGS)

# Which loss suits which data: hours, and it goes on where it was interrupted, also from the committed result.
study: build
	$(PYTHON) -m benchmarks.study $(ARGS)
	$(PYTHON) -m benchmarks.study --collect
	$(MAKE) tables

# A quick look: each op, the goals and the peers; prints only. bench-full writes benchmarks/results, on an idle machine.
bench: build
	$(PYTHON) -m pytest benchmarks/test_micro.py --benchmark-columns=min,median,iqr,rounds
	$(PYTHON) -m benchmarks.loss --quick $(ARGS)

# One commit for all of it: the first results make the tree dirty.
bench-full: export COMMIT := $(shell git describe --always --dirty 2>/dev/null)
bench-full: export OMP_NUM_THREADS := 1
bench-full: build
	$(PYTHON) -m examples.all_species --memory-only --out benchmarks/results/all_species_memory.json
	$(PYTHON) -m examples.all_species --save-logits data/species_logits.pt --out benchmarks/results/all_species.json
	$(PYTHON) -m benchmarks.loss
	$(PYTHON) -m benchmarks.linear
	$(PYTHON) -m benchmarks.gradient
	$(MAKE) tables

# Every table and plot of README and docs, from the JSON in benchmarks/results.
tables: build
	$(PYTHON) -m benchmarks.tables

CPP_SOURCES = csrc/*.h csrc/*/*.h csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu tests/kernels/*.h tests/kernels/*.cpp \
  tests/kernels/*/*.h tests/kernels/*/*.cpp benchmarks/model/*.h benchmarks/model/*.cpp \
  benchmarks/tests/*.cu

CHECK_SCHEMA = $(PYTHON) -m check_jsonschema --builtin-schema
lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(FORMAT_CPP) --dry-run --Werror $(CPP_SOURCES)
	$(CHECK_SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(CHECK_SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(CHECK_SCHEMA) vendor.citation-file-format CITATION.cff

format: $(ENVIRONMENT)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(FORMAT_CPP) -i $(CPP_SOURCES)

# On a machine with a GPU: its tests, a sanitized run of a few, the benchmarks; results in OUT.
OUT ?= $(CURDIR)/out
gpu: export TOPK_FAST_BUILD := require
gpu: build
	$(PYTHON) -c "import topk_fast as t; assert 'cuda' in t.available_backends('cuda'), t.build_info()['backends']['cuda']"
	$(PYTHON) -m benchmarks.gpu $(ARGS)

# The host code of the CUDA backend with a CUDA build of torch, under a stand-in for the CUDA runtime: needs nvcc and 6 GB
# of disk, no GPU. Each TORCH has an environment of its own, and the checkout's own build stays as it is. Of Triton's
# tests those run that depend on the build of torch, and not on the version of Triton that it brings.
TORCH ?= 2.11.0
CUDA_HOST := .venv/cuda-host-$(TORCH)
CUDA_HOST_TESTS := tests/kernels/test_cuda_host.py $(addprefix tests/kernels/test_triton.py::test_,\
  new_numbers_compile_nothing cpu_tensors_without_the_interpreter import_leaves_triton_alone)
cuda-host: export TOPK_FAST_BUILD := require
cuda-host: export TORCH_CUDA_ARCH_LIST := 9.0
cuda-host: $(CUDA_HOST)/installed
	$(CUDA_HOST)/bin/python setup.py --quiet build --build-base $(CUDA_HOST)/build --build-lib $(CUDA_HOST)/package
	$(CUDA_HOST)/bin/python -m pytest -o "pythonpath=$(CUDA_HOST)/package . tests" -s -rs -vv $(CUDA_HOST_TESTS) $(ARGS)

$(CUDA_HOST)/installed:
	python3 -m venv $(CUDA_HOST)
	$(CUDA_HOST)/bin/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)" "numpy<2.4" \
	  "setuptools>=77" ninja pybind11 pytest pytest-benchmark
	touch $@

# A source distribution, and from it a wheel for every Python from 3.10 on and every torch from 2.11 on; in dist/. Where
# auditwheel is installed it names the oldest glibc on which the wheel runs; torch's own libraries stay out of it.
wheel: export TOPK_FAST_BUILD ?= require
wheel: $(ENVIRONMENT)
	rm -rf dist
	$(PYTHON) setup.py --quiet sdist
	$(PYTHON) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist dist/topk_fast-*.tar.gz
	if $(PYTHON) -c "import auditwheel" 2>/dev/null; then \
	  export PATH="$$(dirname $$(command -v $(PYTHON))):$$PATH" && \
	  $(PYTHON) -m auditwheel repair $(foreach name,libtorch libc10 libcudart,--exclude "$(name)*") \
	    --wheel-dir dist dist/*-linux_*.whl && rm dist/*-linux_*.whl; fi
	ls dist

# The wheel of dist/ in a fresh environment without a compiler, which borrows torch from this one.
test-wheel: export TOPK_FAST_DIST := $(CURDIR)/dist
test-wheel: $(ENVIRONMENT)
	$(PYTHON) -m pytest tests/kernels/test_build.py -k "distributions_are_complete or wheel_runs"

# The changelog of the version of TAG, such as v0.2.0, in dist/; fails where the package has another version.
release-notes:
	mkdir -p dist
	grep -qx '__version__ = "$(TAG:v%=%)"' topk_fast/__init__.py
	awk '/^## /{on = $$2 == "$(TAG:v%=%)"; next} on' CHANGELOG.md > dist/notes.md

clean:
	rm -rf build dist .cache .venv topk_fast/*.so *.egg-info
