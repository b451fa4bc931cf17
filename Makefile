# Two commands: `make demo` measures every method on this machine, `make test` runs what CI runs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EMULATED ?= .venv-emulator
DEMO ?= memory_test/sweeps/demo.yaml
DEMO_DIR ?= results/runs/demo
TEST_WORKERS ?= 2

.PHONY: demo test test-full lint reference workloads systems engine-cpu auto-search mnist trainer-overhead seeds \
        emulator-check prediction-times gpu-campaign clean

demo: $(VENV)/.installed
	@mkdir -p $(dir $(DEMO_DIR))
	$(BIN)/memory-test sweep $(DEMO) --output-dir $(DEMO_DIR) --on-mismatch rerun --report

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -m "not gpu and not full" -n $(TEST_WORKERS) --dist loadfile

# Every stated count instead of a seeded sample of them, 500 random cases a method; writes their records when all passed.
# Over an hour on 2 cores; the same command goes on where it was stopped.
test-full: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "full or counted" -n $(TEST_WORKERS) --dist worksteal --full-record results tests

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The committed CPU records: about 17 minutes on 2 cores that do nothing else.
reference: $(VENV)/.installed
	mkdir -p results/cpu
	$(BIN)/memory-test sweep memory_test/sweeps/cpu_small.yaml --output-dir results/cpu --report

# Every system, small, measured: its memory by part, ten minutes on 2 cores that do nothing else; and `auto` against its
# ordinary training, in turns on one thread, half an hour.
workloads: $(VENV)/.installed
	mkdir -p results/workloads results/workloads_auto results/diffusers_auto build/small-diffusers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lora]'
	$(BIN)/memory-test sweep workloads --output-dir results/workloads --report
	$(BIN)/memory-test compare workloads_auto --output-dir results/workloads_auto
	$(BIN)/python memory_test/diffusion_profile/small_diffusers.py build/small-diffusers
	$(BIN)/memory-test compare diffusers_auto --output-dir results/diffusers_auto

# Every system at its authors' size, predicted for one H100; what attention takes at panda's 4096 tokens where its
# matrices are kept; what norms cost by either rule; and one image of 16,384 tokens. A minute or two.
systems: $(VENV)/.installed
	mkdir -p results/systems results/attention results/norms results/pixels
	$(BIN)/python memory_test/diffusion_profile/norm_rules.py results/norms/record.json
	for system in dit x2 "x2 --train full" "x2 --model-options x2_fuse_every=1" set \
	  "set --train encoder_then_full(5000)" ddt panda; do \
	  for method in vanilla bookkeeping ghost; do \
	    name=$$(echo "$$system $$method" | tr -cs '[:alnum:]_' - | sed 's/-$$//'); \
	    $(BIN)/memory-test predict --workload $$system --experiment $$method --batch-size 8 \
	      --output results/systems/$$name.json || exit 1; \
	  done; \
	done
	for kernel in math efficient; do \
	  $(BIN)/memory-test predict --workload panda --experiment vanilla --batch-size 2 \
	    --gpu custom:memory=80,attention=$$kernel --output results/attention/$$kernel.json || exit 1; \
	done
	for method in vanilla lean; do \
	  $(BIN)/memory-test predict --experiment $$method --image-size 256 --in-channels 3 --batch-size 1 \
	    --output results/pixels/$$method.json || exit 1; \
	done

# The clipping engine against ordinary training and Opacus, in turns on one thread; finished configurations are kept.
engine-cpu: $(VENV)/.installed
	mkdir -p results/engine_cpu
	$(BIN)/memory-test compare engine_cpu --output-dir results/engine_cpu

# What `auto` chooses against every other plan of three small models: about ten minutes on one core.
auto-search: $(VENV)/.installed
	mkdir -p results/auto_search
	$(BIN)/python memory_test/diffusion_profile/auto_search.py results/auto_search/record.json

# A class-conditional DiT on 4000 real MNIST images at epsilon 10 and without noise, and what a classifier trained on its
# samples knows of 1000 held-out ones: under an hour on 2 cores that do nothing else.
MNIST_RUNS := results/runs/mnist
mnist: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mnist]'
	rm -rf $(MNIST_RUNS)
	$(BIN)/dit-dp train --recipe mnist_eps10 --output-dir $(MNIST_RUNS)/eps10
	$(BIN)/dit-dp train --recipe mnist_eps10 --epsilon None --noise-multiplier 0 --output-dir $(MNIST_RUNS)/inf
	for run in eps10 inf; do \
	  $(BIN)/dit-dp sample --checkpoint $(MNIST_RUNS)/$$run/000-* --output $(MNIST_RUNS)/$$run/samples \
	    --num-samples 5000 --sampler ddim --steps 16 --batch-size 500 --npz && \
	  $(BIN)/dit-dp evaluate $(MNIST_RUNS)/$$run/samples/samples.npz --test mnist:test \
	    --output $(MNIST_RUNS)/$$run/accuracy.json || exit 1; \
	done
	$(BIN)/dit-dp evaluate mnist:train --test mnist:test --output $(MNIST_RUNS)/real.json
	$(BIN)/python memory_test/diffusion_profile/mnist_result.py $(MNIST_RUNS) results/mnist

# Drawing, charging, logging and averaging on top of the engine's step, ten minutes on one core; a Poisson draw and the
# search for a noise multiplier, a minute.
trainer-overhead: $(VENV)/.installed
	mkdir -p results/trainer
	$(BIN)/python memory_test/diffusion_profile/trainer_overhead.py results/trainer/overhead.json
	$(BIN)/python memory_test/diffusion_profile/privacy_times.py results/trainer/privacy_times.json

# How long a prediction of DiT-XL/2 takes by each method, and a plan: three minutes on 2 cores that do nothing else.
prediction-times: $(VENV)/.installed
	mkdir -p results/prediction
	$(BIN)/python memory_test/diffusion_profile/prediction_times.py results/prediction/times.json

# The commands the project was started with, at full size. On a machine without some 50 GB the second ends, as it
# should, in a record with status oom and exit code 1.
seeds: $(VENV)/.installed
	mkdir -p results/seeds
	$(BIN)/python memory_test/diffusion_profile/single_experiment.py --experiment vanilla \
	  --output results/seeds/vanilla-latent.json --image-size 256 --patch-size 2 --in-channels 4 --batch-size 1 --num-iter 3
	-$(BIN)/python memory_test/diffusion_profile/single_experiment.py --experiment ghost \
	  --output results/seeds/ghost-pixels.json --image-size 256 --patch-size 2 --in-channels 3 --batch-size 1 --num-iter 3

# Predictions against torch's CUDA build on an emulated CUDA runtime, without a GPU: needs gcc and 6 GB for that build.
# About an hour on 2 cores that do nothing else; finished configurations are kept in build/emulator.
emulator-check: $(VENV)/.installed $(EMULATED)/.installed
	mkdir -p results/prediction
	OMP_NUM_THREADS=1 $(BIN)/python -m memory_test.predict.emulator.check $(EMULATED)/bin/python results/prediction

# Everything that is claimed about CUDA, measured on this machine's GPU in parts; the same command goes on where it
# stopped. No network beyond the install. See docs/gpu.md; ARGS="--list" lists the parts.
MINUTES ?= 8
gpu-campaign: $(VENV)/.installed
	@mkdir -p results
	$(BIN)/python -m memory_test.campaign --minutes $(MINUTES) $(ARGS)

$(EMULATED)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EMULATED)
	grep -Ev '^(torch|triton)==' constraints.txt > $(EMULATED)/constraints.txt
	$(EMULATED)/bin/python -m pip install --quiet --disable-pip-version-check -c $(EMULATED)/constraints.txt \
	  torch==2.11.0 -e .
	touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.cfg pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(EMULATED) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
