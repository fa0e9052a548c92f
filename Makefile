# `make demo` shows what the template makes; `make test` proves it.
PYTHON ?= python3
PORT ?= 8080
TEMPLATE := {{cookiecutter.project_slug}}
REQUIREMENTS := $(TEMPLATE)/requirements
DEMO := build/demo-venv
DEV := build/dev-venv
COMPILE := uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-header --no-annotate

# The template is code that runs where it stands. What running it leaves behind belongs in build/,
# or else it would be in every project that is made from this folder.
export PYTHONPYCACHEPREFIX := $(CURDIR)/build/pycache
export RUFF_CACHE_DIR := $(CURDIR)/build/ruff
export HYPOTHESIS_STORAGE_DIRECTORY := $(CURDIR)/build/hypothesis
export MYPY_CACHE_DIR := $(CURDIR)/build/mypy
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 12

$(DEMO)/installed: requirements/demo.lock
	@$(PYTHON) -m venv $(DEMO)
	@$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/demo.lock
	@touch $@

$(DEV)/installed: requirements/dev.lock $(DEMO)/installed
	$(PYTHON) -m venv $(DEV)
	$(DEMO)/bin/uv pip sync --quiet --python $(DEV)/bin/python requirements/dev.lock
	touch $@

.PHONY: demo
demo: $(DEMO)/installed  ## Make the default project, train, serve and ask it; stop with Ctrl-C
	@PORT=$(PORT) $(DEMO)/bin/python scripts/demo.py

.PHONY: test
test: lint test-samples test-generator  ## Everything: lint, types, the samples side by side, what is made

.PHONY: lint
lint: $(DEV)/installed  ## Style, formatting and types, of the generator and of the template
	$(DEV)/bin/ruff check
	$(DEV)/bin/ruff format --check
	$(DEV)/bin/mypy
	cd '$(TEMPLATE)' && ../$(DEV)/bin/mypy

# The tests of the service itself run in each project that `test-generator` makes; while one works
# on them, `make test-in-place` is quicker.
.PHONY: test-samples test-in-place
test-samples: TESTS := tests/test_*.py
test-samples test-in-place: $(DEV)/installed
	rm -rf build/artifacts
	cd '$(TEMPLATE)' && ARTIFACTS_DIR=../build/artifacts ../$(DEV)/bin/python -m app.train
	cd '$(TEMPLATE)' && ARTIFACTS_DIR=../build/artifacts DEFAULT_MODEL=fraud \
		../$(DEV)/bin/python -m pytest -p no:cacheprovider -W error $(TESTS)

# Side by side, as much of each is to wait for processes.
.PHONY: test-generator
test-generator: $(DEV)/installed
	$(MAKE) --jobs=3 --output-sync=target test-service test-projects test-operations

OPERATIONS_TESTS := tests/test_image.py tests/test_pod.py tests/test_compose.py tests/test_kubernetes.py
SERVICE_TEST := 'tests/test_baked_projects.py::test_it_passes_its_own_checks_and_keeps_what_its_readme_says[onnx]'
PYTEST = PATH="$(CURDIR)/$(DEV)/bin:$$PATH" $(DEV)/bin/python -m pytest

.PHONY: test-service
test-service: $(DEV)/installed  ## The test that runs those of the service, in a project that is made
	$(PYTEST) $(SERVICE_TEST)

.PHONY: test-projects
test-projects: $(DEV)/installed  ## The tests of what is made: every kind, hostile answers, updates, the demo, how it is watched
	$(PYTEST) $(OPERATIONS_TESTS:%=--ignore=%) --deselect=$(SERVICE_TEST)

.PHONY: test-operations
test-operations: $(DEV)/installed  ## Those of images and manifests, for which .ci/run installs buildah and others
	$(PYTEST) $(OPERATIONS_TESTS)

.PHONY: bench bench-fire bench-shared-cache bench-rollout bench-alerts bench-observability
bench: $(DEV)/installed  ## Side by side with other servers, an hour; ARGS=--quick for a look; see benchmarks/
	$(DEV)/bin/python -m benchmarks $(ARGS)

bench-fire: $(DEV)/installed  ## Bad neighbours, poison, overload, a stop and hang-ups, a quarter of an hour
	$(DEV)/bin/python -m benchmarks.fire $(ARGS)

bench-shared-cache: $(DEV)/installed  ## 100,000 requests to services that share a failing Redis, and what a hang adds, three minutes
	$(DEV)/bin/python -m benchmarks.shared_cache $(ARGS)

bench-rollout: $(DEV)/installed  ## Rolling restarts through HAProxy and killed workers, 100,000 requests, five minutes
	$(DEV)/bin/python -m benchmarks.rollout $(ARGS)

bench-alerts: $(DEV)/installed  ## Each alert brought about on purpose in a live service, a quarter of an hour
	$(DEV)/bin/python -m benchmarks.alerts $(ARGS)

bench-observability: $(DEV)/installed  ## What metrics, logs, traces and drift cost; 50,000 lines; scrapes; ten minutes
	$(DEV)/bin/python -m benchmarks.observability $(ARGS)

.PHONY: format
format: $(DEV)/installed  ## Mend style and formatting
	$(DEV)/bin/ruff check --fix
	$(DEV)/bin/ruff format

.PHONY: lock
lock: $(DEMO)/installed  ## Lock newest versions, with hashes, here and for each kind of model
	cd requirements && ../$(DEMO)/bin/$(COMPILE) demo.in -o demo.lock
	cd requirements && ../$(DEMO)/bin/$(COMPILE) policy.in -o policy.lock
	cd requirements && ../$(DEMO)/bin/$(COMPILE) dev.in ../$(REQUIREMENTS)/*.in ../$(REQUIREMENTS)/*/*.in -o dev.lock
	for kind in onnx sklearn image; do ( cd '$(REQUIREMENTS)' && \
		../../$(DEMO)/bin/$(COMPILE) service.in $$kind/model.in -o $$kind/service.lock && \
		../../$(DEMO)/bin/$(COMPILE) service.in $$kind/model.in $$kind/train.in dev.in -o $$kind/dev.lock ) || exit 1; done
	for kind in onnx image; do ( cd '$(REQUIREMENTS)' && \
		sed -E 's/^onnxruntime([^-_.A-Za-z0-9]|$$)/onnxruntime-gpu[cuda,cudnn]\1/' $$kind/model.in | \
		../../$(DEMO)/bin/$(COMPILE) service.in - -o $$kind/service-cuda.lock ) || exit 1; done

.PHONY: bench-lock
bench-lock: $(DEMO)/installed  ## The same for those that are measured side by side
	for server in benchmarks/servers/*/; do ( cd $$server && ../../../$(DEMO)/bin/$(COMPILE) \
		--constraint ../../../requirements/dev.lock requirements.in -o requirements.lock ) || exit 1; done

.PHONY: clean
clean:  ## Remove what was made here
	rm -rf build
