# What can be asked of minireft. Each goal sets up what it needs, also in a fresh clone: the first takes a few minutes.
#
#   make demo         tune the shipped base by LoReFT, (IA)3, LoRA and in full, and see what changed (3 minutes)
#   make test         the tests that need no GPU, no other library and little patience (15 minutes at most)
#   make test-all     all of them
#   make tutorials    run every tutorial and render its page
#   make bench        measure the kernels        make gpu     build the CUDA kernels and test them on this GPU
#   make clean        remove what was built, and .venv
#
# make demo PYTHON=/path/to/python uses that environment, which has torch, and leaves .venv alone.

BOOT ?= python3
ifdef PYTHON
  INSTALLED :=
else
  PYTHON := .venv/bin/python
  INSTALLED := .venv/installed
endif
# The models here are small: one thread a process is the fastest.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all tutorials bench gpu kernels clean

demo: kernels
	$(PYTHON) -m minireft demo

test: kernels
	$(PYTHON) -m pytest -q -m "not slow and not peers and not gpu"

test-all: kernels $(INSTALLED:installed=peers)
	$(PYTHON) -m pytest -q

tutorials: kernels
	$(PYTHON) tutorials/make.py

bench: kernels
	$(PYTHON) -m minireft bench

gpu: kernels
	$(PYTHON) -m pytest -q -m gpu

# Built in place, file by file as they change. Without a compiler everything runs on plain PyTorch.
kernels: $(INSTALLED)
	@$(PYTHON) setup.py -q build_ext --inplace || echo "minireft: the kernels could not be built (see above); plain PyTorch is used"

.venv/installed: constraints.txt pyproject.toml
	test -x .venv/bin/python || $(BOOT) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt setuptools wheel ninja torch
	MINIREFT_KERNELS=0 .venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test,tutorials]'
	@touch $@

.venv/peers: .venv/installed
	.venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[peers]'
	@touch $@

clean:
	rm -rf .venv build dist runs *.egg-info minireft/_kernels.so .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
