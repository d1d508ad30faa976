# `make demo` and `make test` set up .venv themselves; nothing else is needed but Python >= 3.10.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test zoo bench clean

demo: .venv/installed
	$(BIN)/pathlift demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

zoo: .venv/installed
	$(BIN)/python -m pytest -q -m zoo tests/zoo

bench: .venv/installed
	$(BIN)/python benchmarks/phases.py

# torch comes first and pinned, so that no dependency draws another build of it; the model zoos
# come without dependencies, because theirs would.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps torchvision timm
	$(BIN)/python -m pip install -q -c constraints.txt pillow pyyaml huggingface_hub
	touch $@

clean:
	rm -rf .venv demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
