# make demo: set up, make demo data, prepare, train, test.   make test: set up, run all tests.   make lint
# The virtual environment is made once, and again when requirements.txt changes. PYTHON=python3.12 picks another one.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
DEMO ?= demo

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	cp requirements.txt $@

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(RUN) demo_data.py --out $(DEMO)/data --layout sysu --ids 100 --seed 0
	$(RUN) pre_process_sysu.py --data_path $(DEMO)/data --img_h 96 --img_w 48
	$(RUN) train_ext_test0.py --dataset sysu --data_path $(DEMO)/data --gpu cpu --arch resnet18 --weights none \
	  --img_h 96 --img_w 48 --optim adam --lr 0.01 --epochs 8 --eval_every 2 \
	  --model_path $(DEMO)/save_model/ --log_path $(DEMO)/log/
	$(RUN) testa.py --data_path $(DEMO)/data --gpu cpu --all --baselines --model_path $(DEMO)/save_model/ \
	  --resume sysu_adp_joint_co_nog_ch_nog_sq1_aug_G_erase_0.5_p4_n8_lr_0.01_seed_0_9_adam_best.t \
	  --json $(DEMO)/results.json

test: $(VENV)/.installed
	$(RUN) -m pytest -q

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO)
