# `make` sets up, `make demo` trains on the embedded data, `make test` tests; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
APT_PACKAGES := ffmpeg libavcodec-dev libavformat-dev libavutil-dev libswscale-dev libffmpeg-nvenc-dev \
	pkg-config g++ python3-dev python3-venv

.DEFAULT_GOAL := $(VENV)
.PHONY: demo demo-from-scratch test test-all test-browser test-ffmpeg7 test-vllm test-newest test-oldest dist lint \
	bench gpu gpu-kit rehearse clean system-packages $(VENV)

# Installs the packages $(1) where this user may, else prints the command and fails.
define apt_install
	if [ "$$(id -u)" = 0 ]; then run=""; elif sudo -n true 2>/dev/null; then run="sudo"; else \
		echo "System packages are missing. Run this, then make again:"; \
		echo "  sudo apt-get install -y $(1)"; exit 1; fi; \
	$$run apt-get update -qq && $$run env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $(1)
endef

$(VENV): system-packages $(VENV)/.installed

system-packages:
	@if command -v ffmpeg g++ pkg-config >/dev/null && pkg-config --exists libavcodec libavformat libavutil libswscale ffnvcodec; \
	then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "Install FFmpeg 5 to 8 with its development files, ffnvcodec headers, pkg-config and a C++ compiler, then run make again."; exit 1; fi; \
	$(call apt_install,$(APT_PACKAGES))

$(VENV)/.installed: pyproject.toml setup.py kernels/pyproject.toml constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch 'setuptools>=77'
	$(BIN)/pip install -q -c constraints.txt -e ./kernels -e '.[dev]'
	touch $@

# One small pretrained model by three methods, side by side.
SEED ?= 0
demo: $(VENV)
	$(BIN)/python -m tempsamp_fast.demo --seed $(SEED)

# The whole job from random weights. TINY is the model's family: a record of tempsamp_fast/model/families.py, by its name.
TINY ?= qwen2_5_vl
demo-from-scratch: $(VENV)
	$(BIN)/deepspeed --num_accelerators 1 tempsamp_fast/train.py --tiny_family $(TINY) \
		--output_dir runs/scratch_$$(date +%Y%m%d_%H%M%S)

# Two workers, one thread each: a test file stays on one worker, so what its fixtures make is made once. Files are taken
# in alphabetical order: by number of tests, the dearest would come last and alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)
	$(PYTEST) -m "not slow"

test-all: $(VENV)
	$(PYTEST)

# Looks at the report in a real browser.
test-browser: $(VENV)
	@if command -v chromium-headless-shell || command -v chromium || command -v chromium-browser || \
		command -v google-chrome; then exit 0; fi >/dev/null; \
	$(call apt_install,chromium-headless-shell)
	TEMPSAMP_REQUIRE_BROWSER=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/report/test_page.py -k browser

# The video tests with FFmpeg 7.1 in place of the system's.
test-ffmpeg7: $(VENV)
	OMP_NUM_THREADS=1 tests/video/with_ffmpeg7.sh $(BIN) -n 2 --dist loadfile

# vLLM itself, on a CPU, in an environment of its own: 1 GB, some minutes.
VLLM_BIN := .venv-vllm/bin

test-vllm: system-packages $(VLLM_BIN)/.installed
	OMP_NUM_THREADS=1 TEMPSAMP_REQUIRE_VLLM=1 $(VLLM_BIN)/pytest tests/rollout/test_vllm_engine.py

$(VLLM_BIN)/.installed: constraints-vllm.txt tests/rollout/vllm_environment.py
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/pip install -q --upgrade pip
	$(VLLM_BIN)/pip install -q -c constraints-vllm.txt torch torchvision setuptools
	DS_BUILD_OPS=0 $(VLLM_BIN)/pip install -q --no-deps -r constraints-vllm.txt
	$(VLLM_BIN)/python tests/rollout/vllm_environment.py
	touch $@
# The tests with the newest releases that a plain `pip install` brings, and with the oldest that are asked for.
NEWEST := torch==2.14.1 triton==3.8.0 transformers==5.24.0 torchcodec==0.17.0
# Triton 3.6 turns arrays of one number into numbers in its interpreter, which NumPy 2.4 refuses.
OLDEST := torch==2.11.0 triton==3.6.0 transformers==5.17.0 torchcodec==0.13.0 numpy==2.3.5
test-newest: VERSIONS := $(NEWEST)
test-oldest: VERSIONS := $(OLDEST)
test-newest test-oldest: system-packages
	test -x .venv-$@/bin/python || $(PYTHON) -m venv .venv-$@
	.venv-$@/bin/pip install -q $(VERSIONS) 'setuptools>=77'
	.venv-$@/bin/pip install -q $(VERSIONS) -e ./kernels -e '.[dev]'
	OMP_NUM_THREADS=1 .venv-$@/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# Wheels and source distributions of both packages, in dist/, with what the registry would say of them.
dist: $(VENV)
	rm -rf dist build kernels/build
	$(BIN)/pip install -q build twine
	$(BIN)/python -m build -q --outdir dist ./kernels
	$(BIN)/python -m build -q --outdir dist .
	$(BIN)/twine check --strict dist/*

lint: $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)
	$(BIN)/pytest bench/

gpu: $(VENV)
	$(BIN)/python bench/gpu.py

# What is carried along to a card that has no network: packages and videos, under 52 MiB.
gpu-kit: $(VENV)
	$(BIN)/python -m bench.gpu_runs.kit .gpu-kit

# The GPU path on a pretended card, with the CUDA build of torch that the first real one has; QUICK=1 plays a selection.
REHEARSAL := .rehearsal
PLAY := cd $(CURDIR) && env LD_LIBRARY_PATH=$(CURDIR)/$(REHEARSAL)/stub LD_PRELOAD=$(CURDIR)/$(REHEARSAL)/stub/stub.so \
	TRITON_CACHE_DIR=$(CURDIR)/$(REHEARSAL)/triton PYTHONPATH=$(CURDIR):$(CURDIR)/kernels DS_ACCELERATOR=cuda \
	OMP_NUM_THREADS=1 $(REHEARSAL)/bin/python

rehearse: $(REHEARSAL)/stub/libcuda.so.1
	$(PLAY) -m bench.rehearsal $(if $(QUICK),--quick,)
	$(if $(QUICK),,$(PLAY) -m bench.rehearsal.traps)

$(REHEARSAL)/.installed:
	test -x $(REHEARSAL)/bin/python || $(PYTHON) -m venv $(REHEARSAL)
	PIP_CONSTRAINT= $(REHEARSAL)/bin/pip install -q torch==2.11.0 transformers==5.17.0 numpy pillow liger-kernel==0.8.5 \
		peft==0.21.2 fla-core==0.6.0 accelerate pyyaml tensorboard hjson py-cpuinfo setuptools wheel ninja matplotlib jinja2
	PIP_CONSTRAINT= DS_BUILD_OPS=0 $(REHEARSAL)/bin/pip install -q --no-build-isolation deepspeed==0.19.8
	touch $@

$(REHEARSAL)/stub/libcuda.so.1: $(REHEARSAL)/.installed bench/rehearsal/stub.c
	mkdir -p $(@D)/crt
	touch $(@D)/crt/host_defines.h
	$(CC) -shared -fPIC -O1 -o $(@D)/stub.so bench/rehearsal/stub.c -I $(@D) \
		-I $$(echo $(REHEARSAL)/lib/python3.*/site-packages/nvidia/cu13/include)
	cp $(@D)/stub.so $@

clean:
	rm -rf $(VENV) .venv-vllm .venv-test-* $(REHEARSAL) build dist kernels/build *.egg-info kernels/*.egg-info
