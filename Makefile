# Three environments, each made at first use: the releases that constraints.txt pins, the oldest transformers that is
# supported, and whatever pip chooses today.
PYTHON ?= python3
PINNED := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest

# Each process takes a half in order, so that tests of a file share what the file makes; who is done early helps the other.
PYTEST := python -m pytest -n 2 --dist worksteal
# What a new release must not break: loading as the README does, the golden cases, generation and the pipelines.
FIRST_USE := tests/test_docs.py tests/test_remote_code.py tests/test_modeling_pheye.py tests/test_generation.py \
	tests/test_pipeline_pheye.py

API := configuration_pheye image_opening_pheye canvases_pheye image_processing_pheye processing_pheye modeling_pheye \
	generation_pheye layers_pheye vision_pheye blocks_pheye visor_pheye pipeline_pheye answering.engine answering.rows conversion.rules training.formats training.mixture \
	training.collator training.stages training.trained training.trainer evaluation.tasks evaluation.word_attention \
	evaluation.heatmaps evaluation.metrics.anls evaluation.metrics.bleu evaluation.metrics.cider \
	evaluation.metrics.vqa

# Modules are compiled when they are first used, and stay compiled, whatever the surroundings say: to compile them at
# each start takes more than twice as long as to load them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo docs test slow fuzz kills conformance oldest newest gpu lint format always

demo: $(PINNED)/.installed
	$(PINNED)/bin/python examples/demo.py

# The reference of what is meant to be imported, from the docstrings.
docs: $(PINNED)/.installed
	$(PINNED)/bin/pdoc --docformat google --output-directory site $(addprefix pheye.,$(API))

test: $(PINNED)/.installed
	$(PINNED)/bin/$(PYTEST) -m "not slow"

slow: $(PINNED)/.installed
	$(PINNED)/bin/$(PYTEST) -m slow

# Inputs searched for that do harm, ten minutes for each test; `make slow` searches half a minute.
fuzz: $(PINNED)/.installed
	FUZZ=600 $(PINNED)/bin/$(PYTEST) tests/fuzz

# Runs that are killed at twenty random moments each; `make slow` tries two.
kills: $(PINNED)/.installed
	KILLS=20 $(PINNED)/bin/$(PYTEST) tests/kills

conformance: $(PINNED)/.installed
	$(PINNED)/bin/python conformance/run.py -n 2

oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/$(PYTEST) -m "not slow and not once"

# Nothing to do on days when pip chooses the releases that constraints.txt pins.
newest: $(PINNED)/.installed $(NEWEST)/.installed
	for env in $(PINNED) $(NEWEST); do $$env/bin/pip freeze --exclude pheye > $$env/releases.txt; done
	cmp $(PINNED)/releases.txt $(NEWEST)/releases.txt || \
		$(NEWEST)/bin/$(PYTEST) -m "not slow and not once" $(FIRST_USE)

# On a machine with an NVIDIA GPU, with the Python that has torch for it: no environment, no installation, no network.
gpu:
	$(PYTHON) benchmarks/gpu.py --output gpu-results

lint: $(PINNED)/.installed
	$(PINNED)/bin/ruff format --check .
	$(PINNED)/bin/ruff check .

format: $(PINNED)/.installed
	$(PINNED)/bin/ruff format .
	$(PINNED)/bin/ruff check --fix .
	cp *_pheye.py checkpoints/pheye-nano

$(PINNED)/.installed: CHOOSE := cat constraints.txt
$(OLDEST)/.installed: CHOOSE := cat constraints-oldest.txt
$(NEWEST)/.installed: CHOOSE := grep ^torch== constraints.txt
$(PINNED)/.installed: constraints.txt setup.py
$(OLDEST)/.installed: constraints-oldest.txt setup.py
# What pip chooses changes from day to day: made anew unless it was made within twelve hours.
$(NEWEST)/.installed: $(shell find $(NEWEST)/.installed -mmin -720 2>/dev/null | grep -q . || echo always)

# torch first and alone: a later package must not choose another build of it.
%/.installed:
	$(PYTHON) -m venv --clear $*
	$(CHOOSE) > $*/constraints.txt
	$*/bin/pip install --quiet --upgrade pip
	$*/bin/pip install --quiet --no-compile --constraint $*/constraints.txt torch
	$*/bin/pip install --quiet --no-compile --constraint $*/constraints.txt --editable ".[test]"
	touch $@
