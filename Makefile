# Two commands: `make demo` completes real code with the bundled checkpoint; `make test` runs the tests.
# `make demo MODEL=...` has another model do it: a directory, a .gguf file, or a name on the hub.
# Both set up .venv and build the native kernels first; the second time that takes no time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
NATIVE := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

# One rank per GPU where there are GPUs, else one per core; the demo takes two where it can.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
RANKS := $(shell n=$(GPUS); [ $$n -gt 0 ] || n=$$(nproc); [ $$n -ge 2 ] && echo 2 || echo 1)

.PHONY: demo serve test slow lint types clean

# OMP_NUM_THREADS is set so that torchrun need not warn; the engine divides the cores among its ranks itself.
demo: $(VENV)/.built
	@$(if $(findstring .gguf,$(MODEL)),$(PIP) gguf)
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) sess_megatron.py --quiet \
		--example demo/example.json $(if $(MODEL),--model_dir '$(MODEL)')

# On the demo; with your own checkpoint: make serve ARGS="--model_dir DIR"
serve: $(VENV)/.built $(VENV)/.serve
	@$(BIN)/python -m megatron_infer serve $(ARGS)

test: $(VENV)/.built $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

# What takes long: kernels under sanitizers, killed evaluations, compiling ahead, several hosts.
slow: $(VENV)/.built $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

$(VENV)/.installed: requirements.txt constraints.txt
	@echo "setting up $(VENV) (the first time takes a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools wheel -r requirements.txt
	@touch $@

$(VENV)/.serve: $(VENV)/.installed requirements-serve.txt
	@$(PIP) -r requirements-serve.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.installed requirements-dev.txt requirements-eval.txt requirements-serve.txt
	@$(PIP) -r requirements-dev.txt -r requirements-eval.txt -r requirements-serve.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(NATIVE)
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info kernels/cpu/*.so
