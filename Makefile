# What can be asked of minireft. Each goal sets up what it needs, also in a fresh clone: the first takes a few minutes.
#
#   make demo         tune the shipped base by LoReFT, (IA)3, LoRA and in full, and see what changed (3 minutes)
#   make test         the tests that need no GPU, no other library and little patience (15 minutes at most)
#   make test-all     all of them
#   make peers-pyreft hold imports, exports and logits against pyreft, in an environment of its own
#   make tutorials    run every tutorial and render its page
#   make bench        measure kernels, training and generation; write README's tables and pictures (15 minutes)
#   make gpu          build the CUDA kernels, test, check and measure them on this GPU, offline (8 minutes; 20 on a consumer one)
#   make clean        remove what was built, and .venv
#
# make demo PYTHON=/path/to/python uses that environment, which has torch, and leaves .venv alone.

BOOT ?= python3
ifeq ($(origin PYTHON),command line)
  INSTALLED := given
else
  PYTHON := .venv/bin/python
  INSTALLED := .venv/installed
endif
# The models here are small: one thread a process is the fastest.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Two files of tests at a time, where pytest-xdist is there to do it.
TWO_AT_ONCE = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && printf '%s' '-n 2 --dist loadfile')

.PHONY: demo test test-all peers-pyreft tutorials bench gpu kernels given clean

demo: kernels
	$(PYTHON) -m minireft demo

test: kernels
	$(PYTHON) -m pytest -q -m "not slow and not peers and not gpu" $(TWO_AT_ONCE)

test-all: kernels $(INSTALLED:.venv/installed=.venv/peers)
	$(PYTHON) -m pytest -q

peers-pyreft: .venv/pyreft/installed
	.venv/pyreft/bin/python -m pytest -q -m peers tests/test_peers_pyreft.py

tutorials: kernels
	$(PYTHON) tutorials/make.py

bench: kernels
	$(PYTHON) -m minireft bench all

gpu: $(INSTALLED:given=)
	$(PYTHON) benchmarks/gpu.py

# Built in place, file by file as they change. Without a compiler everything runs on plain PyTorch.
kernels: $(INSTALLED)
	@$(PYTHON) setup.py -q build_ext --inplace || echo "minireft: the kernels could not be built (see above); plain PyTorch is used"

given:
	@$(PYTHON) -c "import torch, numpy, tokenizers, safetensors, tqdm" || { \
	  echo "minireft: that environment lacks something: $(PYTHON) -m pip install -c constraints.txt torch numpy tokenizers safetensors tqdm"; exit 1; }

.venv/installed: constraints.txt pyproject.toml
	test -x .venv/bin/python || $(BOOT) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt setuptools wheel ninja torch
	MINIREFT_KERNELS=0 .venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test,tutorials]'
	@touch $@

.venv/peers: .venv/installed
	MINIREFT_KERNELS=0 .venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[peers]'
	@touch $@

.venv/pyreft/installed: constraints-pyreft.txt
	test -x .venv/pyreft/bin/python || $(BOOT) -m venv .venv/pyreft
	.venv/pyreft/bin/python -m pip install -q -c constraints-pyreft.txt torch numpy tokenizers tqdm transformers accelerate datasets \
	  evaluate matplotlib pytest pytest-timeout hypothesis
	.venv/pyreft/bin/python -m pip install -q -c constraints-pyreft.txt --no-deps pyreft pyvene
	@touch $@

clean:
	rm -rf .venv build dist runs *.egg-info minireft/_kernels.so .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
