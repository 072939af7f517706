# make demo   install, prepare Shakespeare, train a small GPT on the CPU, sample from it
# make test   install what the tests need as well, and run them
# make lint   check the style
PYTHON ?= python3
PY := .venv/bin/python

# uv, where there is one, chooses PyTorch's build by the machine, and takes seconds. Else, or where
# it cannot reach PyTorch's own index, pip takes minutes.
define install
	@{ command -v uv >/dev/null && uv pip install --python $(PY) --torch-backend=auto -r $(1); } || \
		$(PY) -m pip install --disable-pip-version-check -r $(1)
endef

.PHONY: demo test lint
.DELETE_ON_ERROR:

demo: .venv/installed data/shakespeare/train.bin
	$(PY) train.py config/train_shakespeare.py --init_from=auto
	$(PY) sample.py --out_dir=out-shakespeare --num_samples=2

test: .venv/installed-dev
	$(PY) -m pytest -n 2

lint: .venv/installed-dev
	$(PY) -m ruff check

data/shakespeare/train.bin: | .venv/installed
	$(PY) prepare.py

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("flatgpt needs Python 3.11 or newer: make demo PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(call install,requirements.txt)
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(call install,requirements-dev.txt)
	@touch $@
