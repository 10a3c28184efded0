# make demo: the whole path on synthetic data, in minutes on a CPU.   make test: the test suite; FULL=--full: all cases, as in CI.   make lint: style.
# make notebooks: every notebook from start to end at a small size, and the commands that the pages begin with.
# make bench DATA_DIR=FOLDER: every benchmark once, small, from the trained work folder in models/.
# make docs: the pages and the API reference, into runs/docs.
PYTHON ?= python3
BIN = .venv/bin
READY = .venv/ready
export TF_CPP_MIN_LOG_LEVEL = 2

.PHONY: demo demo-commands test notebooks bench docs lint

demo: $(READY)
	@start=$$(date +%s) && $(MAKE) --no-print-directory demo-commands && echo "make demo: $$(($$(date +%s) - start)) seconds"

demo-commands:
	rm -rf runs/demo
	$(BIN)/python -m mess_tf.pipeline --workdir=runs/demo --recipe=demo --max_drop_pp=0
	$(BIN)/python -m mess_runtime run runs/demo/bundle runs/demo/examples --output=runs/demo/masks
	@echo "masks: runs/demo/masks, report: runs/demo/report/index.html"

test: $(READY)
	$(BIN)/python -m pytest -q -m "not device and not notebook" --numprocesses 3 --dist loadfile --no-loadscope-reorder $(FULL)

notebooks: $(READY)
	$(BIN)/python -m pytest -q -m notebook --numprocesses 2 --dist loadfile

bench: $(READY)
	$(BIN)/python benchmarks/run_all.py --workdir=models/voc_lite0 --data_dir=$(DATA_DIR) --output=runs/bench

# Fresh, since warnings of pages that did not change would not come again.
docs: $(READY)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs runs/docs
	@echo runs/docs/index.html

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

# The editable install puts mess_tf and mess_runtime on the path of .venv/bin/python.
$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

# Every package of .venv, for MODULE.bazel.
requirements_lock.txt: $(READY)
	$(BIN)/pip freeze --all --exclude-editable --exclude pip > $@
