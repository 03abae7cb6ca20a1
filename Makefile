# `make demo` runs the embedded model on an image; `make test` passes the tests. Both set up what
# they need in .venv first.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all lint test-transformers test-floors tiny shapes report report-shapes clean

demo: .venv/.ready
	$(BIN)/python -m perceptiondlm.apps.demo --output outputs/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Also the browser's tests (with Chromium installed), sharded training and whatever else is slow:
# the markers that pyproject.toml leaves out.
test-all: .venv/.ready
	$(BIN)/python -m pytest -m ""

# Style, formatting, and the types of the root modules. The link names the package for the type
# checker, whatever this folder is called.
lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .venv/types && ln -sfn ../.. .venv/types/perceptiondlm
	cd .venv/types && ../bin/mypy --config-file perceptiondlm/pyproject.toml \
	    $(patsubst %,perceptiondlm/%,$(wildcard *.py))

# transformers' own tests of models and processors; docs/transformers-suite.md has those that fail.
test-transformers: .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check parameterized
	$(BIN)/python tests/transformers_sources.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -o addopts=-q -m transformers_suite \
	    tests/test_transformers_suite.py

# All but the web page and the server at the oldest versions allowed. On x86-64 the
# torch that pip finds of itself brings gigabytes of CUDA: FLOOR_TORCH names another, or its file.
FLOORS := .venv-floors/bin
FLOOR_TORCH ?= $(shell grep '^torch==' requirements-floors.txt)
test-floors: .venv-floors/.ready
	OMP_NUM_THREADS=1 $(FLOORS)/python -m pytest -n 2 --ignore-glob='tests/test_serve_*' \
	    --ignore-glob='tests/test_web_*'

# bfloat16 only where the processor computes in it: emulated, it is ten times slower than float32.
BF16 := $(if $(shell grep -m 1 avx512_bf16 /proc/cpuinfo 2>/dev/null),true,false)
# The embedded model, of everyday things, in two stages: its vision path learns names, then it learns
# to write. The first time, npm fetches the drawings. Learning names is compiled where there is a
# compiler. The weights go to tiny/ in shards, as the Hub takes no file over 10 MB in plain git:
#   python convert_checkpoint.py --source runs/tiny --output NEW --max-shard-size 8MB
COMPILE := $(if $(shell command -v g++ 2>/dev/null),true,false)
tiny: .venv/.ready
	$(BIN)/perceptiondlm train configs/tiny_names.yaml trainer.bf16=$(BF16) \
	    trainer.torch_compile=$(COMPILE)
	$(BIN)/perceptiondlm train configs/tiny.yaml trainer.bf16=$(BF16)

# A model of drawn shapes, of which no drawing has to be fetched; the tests run on one.
shapes: .venv/.ready
	$(BIN)/perceptiondlm train configs/shapes.yaml trainer.bf16=$(BF16)

# What evaluation/examples holds: the embedded model on scenes that it has not seen.
EVALUATE := $(BIN)/perceptiondlm evaluate
EMBEDDED := --model . --subfolder tiny --scene-kind things
SEED := 100000
report: .venv/.ready
	$(EVALUATE) synthetic $(EMBEDDED) --scenes 500 --seed $(SEED) --unseen-scenes 200 \
	    --count-scenes 5 --output outputs/measured.json --texts outputs/texts.json
	$(EVALUATE) sweep $(EMBEDDED) --scenes 60 --seed $(SEED) --steps 1,2,4,8,16,full \
	    --rules fixed,threshold:0.9,threshold:0.6+0.3,factor:1.0,entropy_bound:0.1 \
	    --output outputs/sweep.json
	$(EVALUATE) latency $(EMBEDDED) --regions 1 2 4 8 16 24 --pictures 3 \
	    --output outputs/latency.json
	$(EVALUATE) report --measurements outputs/measured.json \
	    --rows outputs/sweep.json outputs/latency.json --output evaluation/examples \
	    --title "Embedded model on 500 held-out scenes of things"

# The same steps as any benchmark's, on scenes of shapes, by the model that the tests run on.
SHAPES := --model . --subfolder tests/shapes_model
report-shapes: .venv/.ready
	$(EVALUATE) synthetic $(SHAPES) --scenes 500 --seed $(SEED) --output outputs/shapes.json
	$(EVALUATE) synthetic write --scenes 500 --start $(SEED) --output outputs/scenes
	$(EVALUATE) predict $(SHAPES) --benchmark outputs/scenes --batch-size 16 --restart \
	    --output outputs/captions.json
	$(EVALUATE) synthetic judge --benchmark outputs/scenes --predictions outputs/captions.json \
	    --output outputs/answers.json
	$(EVALUATE) score --annotations outputs/scenes --answers outputs/answers.json \
	    --output outputs/scores.json
	$(EVALUATE) report --scores outputs/scores.json --predictions outputs/captions.json \
	    --answers outputs/answers.json --measurements outputs/shapes.json \
	    --output outputs/report-shapes --title "Model of shapes on 500 held-out synthetic scenes"

# Pixels are compared to the last bit and Pillow 13 changed the order of its resize passes, while
# gradio still asks for an older one: so Pillow comes last, by itself.
.venv/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps pillow==13.0.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv-floors/.ready: requirements-floors.txt pyproject.toml
	$(PYTHON) -m venv .venv-floors
	$(FLOORS)/pip install --quiet --disable-pip-version-check $(FLOOR_TORCH)
	grep -v '^torch==' requirements-floors.txt > .venv-floors/others.txt
	$(FLOORS)/pip install --quiet --disable-pip-version-check -r .venv-floors/others.txt
	$(FLOORS)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-floors outputs build *.egg-info
