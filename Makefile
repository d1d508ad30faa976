# `make demo` and `make test` set up .venv themselves; nothing else is needed but Python >= 3.10.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test zoo operators bench reproduce docs dist clean

demo: .venv/installed
	$(BIN)/pathlift demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# Hours of models: random scales keep every bit of each one. Rows that docs/zoo.json holds are kept;
# `make zoo FRESH=--fresh` starts again.
zoo: .venv/installed .venv/zoo/installed
	$(BIN)/python -m pytest -q -m zoo
	$(BIN)/python tests/zoo/survey.py $(FRESH)
	.venv/zoo/bin/python tests/zoo/third_party.py $(FRESH)

# Every operator of PyTorch's own sample database: bits kept, errors worded, reports true.
operators: .venv/installed
	$(BIN)/python -W ignore tests/operators/sweep.py --jobs 2

bench: .venv/installed
	$(BIN)/python benchmarks/conditioning.py --json bench.json

# The paper's experiments in their small forms, into docs/reproduced.
reproduce: .venv/installed
	$(BIN)/pathlift reproduce all --small -o docs/reproduced

# The site, into site/index.html.
docs: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

# A wheel and a source distribution, into dist/.
dist: .venv/installed
	$(BIN)/python -m pip install -q build
	$(BIN)/python -m build --outdir dist .

# torch comes first and pinned, so that no dependency draws another build of it; the model zoos and
# the training frameworks come without dependencies, because theirs would.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps torchvision timm transformers \
		accelerate lightning pytorch-lightning lightning-utilities torchmetrics
	$(BIN)/python -m pip install -q -c constraints.txt pillow pyyaml huggingface_hub tokenizers \
		regex requests tqdm filelock packaging fsspec psutil
	touch $@

# Other people's libraries live apart from the project's: they look into .venv, and it not into them.
.venv/zoo/installed: .venv/installed tests/zoo/third_party.txt
	$(BIN)/python -m venv .venv/zoo
	$(BIN)/python -c "import site; print(*site.getsitepackages(), sep='\n')" > .venv/zoo/path
	.venv/zoo/bin/python -c "import pathlib, shutil, site; shutil.copy('.venv/zoo/path', \
		pathlib.Path(site.getsitepackages()[0], 'project.pth'))"
	.venv/zoo/bin/python -m pip install -q --no-deps --no-compile -r tests/zoo/third_party.txt
	rm -rf .venv/zoo/lib/python*/site-packages/torchaudio/lib
	touch $@

clean:
	rm -rf .venv demo-output dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
