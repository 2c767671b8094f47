# make demo   builds a bundle from the checkpoint in the repository and asks it about a screen
# make test   linters, types and tests
# make test-all   with every variant of families and dialects
# make test-oldest   run-time tests with the oldest packages that are promised
# Each sets up what it needs in .venv by itself. PYTHON chooses the interpreter (3.10 or later).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH ?= torch==2.13.0
# strict: links to the mapped packages as they are laid out in Python, which mypy and editors can follow
EDITABLE := --config-settings editable_mode=strict
OUT ?= demo-out

.PHONY: demo test test-all test-oldest lint links bench clean

$(VENV)/runs:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	touch $@

# torch first and pinned: an open requirement would fetch gigabytes of CUDA libraries
$(VENV)/torch: $(VENV)/runs
	$(PIP) $(TORCH)
	touch $@

$(VENV)/exports: $(VENV)/torch setup.cfg
	$(PIP) $(EDITABLE) -e '.[cpu,export]'
	touch $@

$(VENV)/tests: $(VENV)/torch setup.cfg
	$(PIP) $(EDITABLE) -e '.[cpu,export,rtx,dev]'
	touch $(VENV)/exports $@

demo: $(VENV)/exports
	rm -rf $(OUT) && mkdir -p $(OUT)
	$(BIN)/ppexport build models/pocket -o $(OUT)/pocket.bundle
	$(BIN)/ppexport run $(OUT)/pocket.bundle -i docs/settings.png --overlay $(OUT)/overlay.png \
		"What is the Region?" "What is the Brightness?"
	@echo "the screen: docs/settings.png; what was pruned of it: $(OUT)/overlay.png"

test: lint
	$(BIN)/python -m pytest

# also every variant that "make test" leaves out
test-all: lint
	$(BIN)/python -m pytest -m ""

# with the lowest version of every run-time dependency; OLDEST_PYTHON: the interpreter, such as python3.10
test-oldest: $(VENV)/tests
	$(BIN)/python tests/oldest.py $(OLDEST_PYTHON)

lint: links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build && ../$(BIN)/mypy --config-file ../pyproject.toml -p ppexport
	cd build && MYPYPATH=../examples/train_pocket ../$(BIN)/mypy --config-file ../pyproject.toml ../examples/train_pocket/train.py

# after a file was added, removed or renamed
links: $(VENV)/tests
	$(PIP) $(EDITABLE) --no-deps -e .

# PRUNESID: a checkout of PruneSID; REFERENCE: one of PixelPrune; REFERENCE_PYTHON: a Python with transformers 4.57.6, to measure side by side
bench: $(VENV)/tests
	mkdir -p build/bench
	$(BIN)/python bench/selector.py -o build/bench/selector.json \
		$(if $(REFERENCE),--reference $(REFERENCE) --reference-python $(REFERENCE_PYTHON))
	$(BIN)/python bench/prunesid.py -o build/bench/prunesid.json $(if $(PRUNESID),--reference $(PRUNESID))
	$(BIN)/python bench/first_token_llava.py -o build/bench/first_token_llava_300m.json \
		$(if $(PRUNESID),--reference $(PRUNESID))
	$(BIN)/python bench/clip_blocks.py -o build/bench/clip_blocks.json
	$(BIN)/python bench/tiles.py -o build/bench/tiles.json
	$(BIN)/python bench/noise.py -o build/bench/noise.json
	$(BIN)/python bench/lengths.py -o build/bench/lengths_300m.json
	$(BIN)/python bench/help.py -o build/bench/help.json
	$(BIN)/python bench/build.py -o build/bench/build.json
	$(BIN)/python bench/build.py --precision int4 --runs 1 -o build/bench/build_int4.json
	$(BIN)/python bench/build.py --target tensorrt-rtx --runs 1 -o build/bench/build_rtx.json
	$(BIN)/python bench/build.py --target tensorrt-rtx --precision int4 --runs 1 -o build/bench/build_rtx_int4.json
	$(BIN)/python bench/build.py --target tensorrt-rtx --precision int8 --runs 1 -o build/bench/build_rtx_int8.json
	$(BIN)/python bench/memory.py -o build/bench/memory.json
	$(BIN)/python bench/host_time.py -o build/bench/host_time.json
	$(BIN)/python bench/sampling.py -o build/bench/sampling.json
	$(BIN)/python bench/build.py --model qwen3_vl:2b --model qwen2_vl:2b --model qwen2_5_vl:3b --model qwen3_vl:4b \
		--runs 1 -o build/bench/build_families.json
	$(BIN)/python bench/build.py --model qwen3_5:2b --model qwen3_5:4b --runs 1 -o build/bench/build_qwen3_5.json
	$(BIN)/python bench/build.py --model qwen3_vl:8b --runs 1 -o build/bench/build_8b.json
	$(BIN)/python bench/context.py --rounds 2 -o build/bench/context_300m.json
	$(BIN)/python bench/context.py --shape 2b --rounds 1 -o build/bench/context_2b.json --plot build/bench/context.svg
	$(BIN)/python bench/end_to_end.py -o build/bench/end_to_end_300m.json \
		$(if $(REFERENCE),--reference $(REFERENCE) --reference-python $(REFERENCE_PYTHON))
	$(BIN)/python -m ppexport.exporters.random_checkpoint build/bench/random_300m --shape 300m
	$(BIN)/python bench/concurrency.py --checkpoint build/bench/random_300m -o build/bench/concurrency_300m.json
	$(BIN)/python bench/serving_load.py --checkpoint build/bench/random_300m -o build/bench/serving_load_300m.json
	$(BIN)/python bench/mask.py -o build/bench/mask.json
	$(BIN)/python bench/calibration.py -o build/bench/calibration.json
	$(BIN)/python bench/end_to_end.py -o build/bench/end_to_end_300m_document.json \
		--image ppexport/bench/images/pdf_gnuplot-020.png \
		$(if $(REFERENCE),--reference $(REFERENCE) --reference-python $(REFERENCE_PYTHON))
	$(BIN)/python bench/end_to_end.py -o build/bench/end_to_end_2b.json --shape 2b --precisions int4,w8a8 \
		--reference-dtypes bfloat16 --runs 3 --full-runs 0 \
		$(if $(REFERENCE),--reference $(REFERENCE) --reference-python $(REFERENCE_PYTHON))
	$(BIN)/python bench/language.py -o build/bench/language_2b.json
	$(BIN)/python bench/latency_noise.py -o build/bench/latency_noise.npz
	$(BIN)/ppexport build models/pocket -o build/bench/pocket -q
	$(BIN)/python bench/soak.py build/bench/pocket -o build/bench/soak.json
	$(BIN)/ppexport build bench/never_pruned -o build/bench/never_pruned -q
	$(BIN)/python bench/accuracy.py build/bench/pocket --never-pruned build/bench/never_pruned -o build/bench/accuracy.json
	$(BIN)/python bench/accuracy_prunesid.py build/bench/pocket -o build/bench/accuracy_prunesid.json

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
