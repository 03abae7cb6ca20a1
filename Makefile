# `make demo` runs the embedded model on a picture; `make test` passes the tests. Both set up what
# they need in .venv first.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test tiny clean

demo: .venv/.ready
	$(BIN)/python -m perceptiondlm.apps.demo --output outputs/demo

test: .venv/.ready
	$(BIN)/python -m pytest

tiny: .venv/.ready
	$(BIN)/perceptiondlm train configs/tiny.yaml

# Pixels are compared to the last bit and Pillow 13 changed the order of its resize passes, while
# gradio still asks for an older one: so Pillow comes last, by itself.
.venv/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps pillow==13.0.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf .venv outputs build *.egg-info
