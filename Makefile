# `make demo`, `make test`, `make bench` and `make evaluate` each do all their own set-up; `make` alone
# does it for the demo.
#
#   PYTHON=python3.12        the interpreter to use; otherwise the first of 3.10 to 3.13 that is found
#   TORCH=… TORCHVISION=…    other builds, as pip requirements
#   DATA=/path [OUT=…]       for `make evaluate`: the folder of the sets, and where tables and plots go
#   DEMO_ARGS=… PYTEST_ARGS=… BENCH_ARGS=… EVALUATE_ARGS=…  arguments of `sam-ml-backend demo`, pytest,
#                            tests.bench, `sam_ext.evaluate all`

PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10)
TORCH := torch==2.13.0
TORCHVISION := torchvision==0.28.0
LABEL_STUDIO := label-studio==1.23.2

VENV := .venv
LABEL_STUDIO_VENV := .venv-labelstudio
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# A stamp is named after what was installed, so that another version is another stamp.
TORCH_DONE := $(VENV)/.installed-$(subst =,,$(TORCH)-$(TORCHVISION))
APP_DONE := $(VENV)/.installed-app
TEST_DONE := $(VENV)/.installed-test
LABEL_STUDIO_DONE := $(LABEL_STUDIO_VENV)/.installed-$(subst =,,$(LABEL_STUDIO))

.PHONY: setup demo test bench evaluate clean
.DELETE_ON_ERROR:

setup: $(APP_DONE) $(LABEL_STUDIO_DONE)

demo: setup
	@$(VENV)/bin/sam-ml-backend demo --label-studio $(LABEL_STUDIO_VENV)/bin/label-studio $(DEMO_ARGS)

test: $(TEST_DONE) $(LABEL_STUDIO_DONE)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest $(PYTEST_ARGS)

bench: $(TEST_DONE)
	@$(VENV)/bin/python -m tests.bench $(BENCH_ARGS)

evaluate: $(TEST_DONE)
	$(if $(DATA),,$(error DATA must name the folder of the sets, got nothing; make evaluate DATA=/path))
	@$(VENV)/bin/python -m sam_ext.evaluate all --data $(DATA) --out $(or $(OUT),evaluation) $(EVALUATE_ARGS)

clean:
	rm -rf $(VENV) $(LABEL_STUDIO_VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# pip goes last into a virtual environment: one without it was made without ensurepip, or half made.
define make_venv
	@test -x $(1)/bin/pip || { rm -rf $(1); \
	for python in $(PYTHONS); do \
	  "$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null || continue; \
	  "$$python" -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
	    "$$python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }; \
	  exec "$$python" -m venv $(1); \
	done; \
	echo >&2 "None of ($(PYTHONS)) is a Python from 3.10 to 3.13; install one, or name it: make PYTHON=/path/to/python3.12"; \
	exit 1; }
endef

# torch first and torchvision without its dependencies: nothing after them asks for another torch.
$(TORCH_DONE):
	$(call make_venv,$(VENV))
	@echo "Installing $(TORCH) into $(VENV)"
	@$(VENV)/bin/python $(PIP_INSTALL) "$(TORCH)"
	@$(VENV)/bin/python $(PIP_INSTALL) --no-deps "$(TORCHVISION)"
	@touch $@

# label-studio-ml pins a Flask without fixes; constraints.txt goes on top, past those pins.
$(APP_DONE): $(TORCH_DONE) pyproject.toml ml_backend/constraints.txt
	@echo "Installing the backend into $(VENV)"
	@$(VENV)/bin/python $(PIP_INSTALL) --editable .
	@$(VENV)/bin/python $(PIP_INSTALL) --no-deps --upgrade -r ml_backend/constraints.txt
	@touch $@

$(TEST_DONE): $(TORCH_DONE) pyproject.toml ml_backend/constraints.txt
	@echo "Installing the backend and its test tools into $(VENV)"
	@$(VENV)/bin/python $(PIP_INSTALL) --editable '.[test]'
	@$(VENV)/bin/python $(PIP_INSTALL) --no-deps --upgrade -r ml_backend/constraints.txt
	@touch $(APP_DONE) $@

$(LABEL_STUDIO_DONE):
	$(call make_venv,$(LABEL_STUDIO_VENV))
	@echo "Installing $(LABEL_STUDIO) into $(LABEL_STUDIO_VENV)"
	@$(LABEL_STUDIO_VENV)/bin/python $(PIP_INSTALL) "$(LABEL_STUDIO)"
	@touch $@
