PYTHON ?= python

.PHONY: check lint types test test-login-node

check: lint types test

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -c "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())" --no-cache

types:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest

# As on a login node, inside a job: srun is installed, a scheduler and a launcher have set their variables.
LOGIN_NODE = env -u HOME LC_ALL=C TZ=Pacific/Kiritimati SLURM_JOB_ID=7 SLURM_JOB_NAME=train SLURM_NTASKS=2 \
	SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NODEID=0 SLURM_NODELIST=node[1-2] RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 \
	MASTER_ADDR=192.0.2.1 MASTER_PORT=1 NODE_RANK=1 CUDA_VISIBLE_DEVICES=0,1 PATH="$(CURDIR)/tests/login_node:$$PATH"

test-login-node:
	$(LOGIN_NODE) $(PYTHON) -m pytest $(TESTS)
