# make demo: set up, draw demo data, prepare, train, test.   make test: set up what tests need on top, run the fast ones.
# make test-all: every test.   make mutants: test the tests.   make lint.   The virtual environment is made once, and
# again when a list of requirements changes.
# PYTHON=python3.12 picks the interpreter that it is made with, DEMO=folder another output. VENV=folder takes another
# environment, which keeps its packages but gets our versions of those in the lists.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
DEMO ?= demo
LOCK = .ci/requirements.lock
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check -c $(LOCK)
# PyTorch's builds for the CPU, of a tenth of the size, which few package indexes have.
CPU_BUILD = $(shell sed -n 's/^torch\(vision\)\?==.*/&+cpu/p' $(LOCK))
CPU_INDEX = PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# What is wrong with PYTHON, if anything: said in one line, before anything is made.
PROBLEM = $(shell \
  if ! $(PYTHON) -c "" 2>/dev/null; then echo "$(PYTHON) does not run here"; \
  elif ! $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))"; then \
    echo "$(PYTHON) is `$(PYTHON) -V 2>&1`, but 3.11 or newer is needed"; \
  elif ! $(PYTHON) -c "import ensurepip, venv" 2>/dev/null; then \
    echo "$(PYTHON) cannot make virtual environments (on Debian: apt-get install python3-venv)"; fi)
CHECK = $(if $(PROBLEM),$(error $(PROBLEM); name another one: make PYTHON=python3.12 $(MAKECMDGOALS)))

.PHONY: demo test test-all mutants lint clean
.DELETE_ON_ERROR:

$(VENV)/.installed: requirements.txt tools/demo_requirements.txt $(LOCK)
	$(CHECK)$(PYTHON) -m venv $(if $(filter .venv,$(VENV)),--clear) $(VENV)
	@command -v nvidia-smi >/dev/null || $(PIP) $(CPU_BUILD) 2>/dev/null || \
	  echo "Without an NVIDIA driver, a small PyTorch is enough, but pip's index has none: make $(MAKECMDGOALS) $(CPU_INDEX)"
	$(PIP) -r tools/demo_requirements.txt
	touch $@

$(VENV)/.tests: $(VENV)/.installed tools/requirements.txt tools/corruption_requirements.txt tests/requirements.txt
	$(PIP) -r tests/requirements.txt
	$(PIP) --no-deps -r tools/corruption_requirements.txt
	touch $@

# From scratch, in minutes: small images, three stages of the backbone (the fourth takes half the time), Adam, a rate that
# falls from the first epoch on, no erasing.
BF16 = import torch, utils; print('bf16' if utils.computes_bf16(torch.device('cpu')) else 'off')
AMP ?= $(eval AMP := $(shell $(RUN) -c "$(BF16)"))$(AMP)
demo: $(VENV)/.installed
	rm -rf $(DEMO) && mkdir $(DEMO)
	$(RUN) -m tools.demo_data --out $(DEMO)/data --ids 400 --images 4 --test_ids 30 --sheet $(DEMO)/people.png
	$(RUN) pre_process_sysu.py --data_path $(DEMO)/data --img_h 64 --img_w 32
	$(RUN) train_ext_test0.py --method gfm2 --data_path $(DEMO)/data --gpu cpu --amp $(AMP) --arch resnet18 --stages 3 \
	  --weights none --img_h 64 --img_w 32 --padding 4 --rande 0 --batch_size 16 --num_pos 2 --optim adam --lr 0.01 \
	  --epochs 6 --schedule triangle --warmup 1 --figures --model_path $(DEMO)/save_model/ --log_path $(DEMO)/log/
	$(RUN) testa.py --data_path $(DEMO)/data --gpu cpu --amp $(AMP) --all --baselines --json $(DEMO)/results.json \
	  --report $(DEMO) --resume $(DEMO)/save_model/sysu_*_best.t
	@echo "Look at $(DEMO)/report.html in a browser, $(DEMO)/people.png and the curves: $(DEMO)/log/sysu_log/*/*.png"

test: $(VENV)/.tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist loadfile -m "not slow and not gpu"

test-all: $(VENV)/.tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist loadfile

# Of these files, those that differ from SINCE are mutated, for MINUTES. A second thread of OpenMP hangs in a fork.
MUTATED = $(addprefix core/,meter.py distributed.py) $(addprefix training/,engine.py step.py run.py optim.py) \
  $(addprefix testing/,engine.py evaluation.py results.py) data_loader.py loss.py methods.py model.py eval_metrics.py \
  ChannelAug.py drawing/figures.py tools/sweep_tables.py $(addprefix tools/search/,index.py file_index.py finder.py)
SINCE ?= HEAD~10
MINUTES ?= 10
mutants: $(VENV)/.tests
	OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 CUDA_VISIBLE_DEVICES= $(RUN) tests/mutants.py mutants.jsonl $(MINUTES) \
	  $(shell git diff --name-only $(SINCE) -- $(MUTATED))

lint: $(VENV)/.tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m tools.records --check

clean:
	rm -rf $(VENV) $(DEMO)
