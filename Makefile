# Two commands need nothing but Python >= 3.11 and make:
#   make demo    start the server on exported/, use it, stop it
#   make test    run every test
# Every environment is made by the target that needs it, with the versions of constraints.txt.
# Works with GNU make 3.81, which macOS has.

PYTHON ?= python3
ARGS ?=
MODELS ?= $(sort $(subst _,-,$(basename $(notdir $(filter-out %/__init__.py,$(wildcard training/tasks/*.py))))))
PROTOS := $(wildcard proto/tenuto/*/*.proto)
SETUP := pyproject.toml constraints.txt .ci/make_venv.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-oldest lint format types stubs check-stubs models networks bench soak clean python
.PHONY: capacity bench-gpu test-front-ends test-gpu test-image test-routing dashboard vocabulary locks bom audit manifests

help:
	@echo 'make demo          start the server on exported/, use it, stop it'
	@echo 'make test          run every test (ARGS="-k name" for some)'
	@echo 'make test-oldest   run the client on the oldest and the newest grpcio and protobuf allowed'
	@echo 'make lint          ruff: rules and format'
	@echo 'make format        ruff: repair what it can'
	@echo 'make types         mypy, strict'
	@echo 'make stubs         write tenuto/v1 anew from proto/'
	@echo 'make check-stubs   compare tenuto/v1 with proto/'
	@echo 'make models        train and export the models anew (-j2: two at once; MODELS="digits" for some)'
	@echo 'make networks      draw the pictures of docs/networks.md and write it (3 CPU minutes)'
	@echo 'make bench         run the benchmarks and write docs/performance.md (ARGS="paced --rounds 1" for some)'
	@echo 'make capacity      write docs/capacity.md from what was measured (ARGS=--measure measures anew)'
	@echo 'make soak          load a server for 30 minutes and see whether it grows (ARGS="--minutes 5")'
	@echo 'make test-gpu      run the tests that need a GPU, and bench-gpu its benchmark'
	@echo 'make test-image    build the image upon a Debian of its own, and use it (root, buildah, debootstrap)'
	@echo 'make test-front-ends  run what is tested on any transport on a server with front ends'
	@echo 'make test-routing  run the tests of deploy/routing (nginx and haproxy on the path; envoy comes along)'
	@echo 'make dashboard     write deploy/monitoring/dashboard.json anew'
	@echo 'make vocabulary    write docs/manifest.md and docs/manifest.schema.json anew'
	@echo 'make locks         write deploy/image/locks anew'
	@echo 'make bom           write build/bom-*.json: what each lock of the image holds, by CycloneDX'
	@echo 'make audit         look for known weaknesses of what the images hold (needs pypi.org)'
	@echo 'make manifests     print the Kubernetes objects of every overlay (kubectl 1.21 or newer)'
	@echo 'make clean         remove environments, caches and builds'

# --- environments -----------------------------------------------------------------------------------

# A missing or unknown python3 is worth a sentence of its own.
python:
	@command -v '$(PYTHON)' >/dev/null || { echo \
	  'error: PYTHON_MISSING: there is no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=...' >&2; exit 1; }

.venv/.stamp: $(SETUP) | python
	@$(PYTHON) .ci/make_venv.py .venv -c constraints.txt -e '.[serving,tracing,diagnosis,demo,midi]' --group dev
	@touch $@

.venv-demo/.stamp: $(SETUP) | python
	@$(PYTHON) .ci/make_venv.py .venv-demo -c constraints.txt -e '.[demo]'
	@touch $@

.venv-stubs/.stamp: $(SETUP) | python
	@$(PYTHON) .ci/make_venv.py .venv-stubs --group stubs
	@touch $@

.venv-oldest/.stamp: $(SETUP) | python
	@$(PYTHON) .ci/make_venv.py .venv-oldest --group oldest
	@touch $@

.venv-newest/.stamp: $(SETUP) | python
	@$(PYTHON) .ci/make_venv.py .venv-newest -c constraints.txt grpcio numpy protobuf --group pytest
	@touch $@

.venv-routing/.stamp: $(SETUP) | python
	@$(PYTHON) .ci/make_venv.py .venv-routing -c constraints.txt --group routing
	@touch $@

.venv-triton/.stamp: $(SETUP) | python
	@$(PYTHON) .ci/make_venv.py .venv-triton --group triton
	@touch $@

.venv-triton-old/.stamp: $(SETUP) | python
	@$(PYTHON) .ci/make_venv.py .venv-triton-old --group triton-old
	@touch $@

.venv-locks/.stamp: $(SETUP) | python
	@$(PYTHON) .ci/make_venv.py .venv-locks -c constraints.txt --group locks
	@touch $@

# --- running it -------------------------------------------------------------------------------------

demo: .venv-demo/.stamp
	@.venv-demo/bin/python examples/demo.py $(ARGS)

# One finished model a step: a killed `make models` goes on where it was (runs/ holds what is done), and
# `make -j2 models` trains two at once, each with one thread.
models: $(MODELS:%=model-%)
model-%: .venv/.stamp
	OMP_NUM_THREADS=1 .venv/bin/tenuto train $* $(ARGS)

# The pictures and figures of docs/networks.md, from the exported models.
networks: .venv/.stamp
	.venv/bin/tenuto diagnose $(ARGS)

# All of them go into the page, some of them to the terminal alone.
bench: .venv/.stamp
	.venv/bin/python -m benchmarks $(or $(ARGS),--write docs/performance.md)

capacity: .venv/.stamp
	.venv/bin/python -m benchmarks.capacity $(or $(ARGS),--write docs/capacity.md)

soak: .venv/.stamp
	.venv/bin/python -m benchmarks.soak $(ARGS)

# One GPU, some minutes. PACED="--sequences 1000" for some of its second part.
bench-gpu: .venv/.stamp
	.venv/bin/python -m benchmarks.gpu $(ARGS)
	.venv/bin/python -m benchmarks.gpu_paced $(PACED)

# --- checking it ------------------------------------------------------------------------------------

test: .venv/.stamp
	.venv/bin/python -m pytest $(ARGS)

# Where there is no GPU it fails, and says what is missing.
test-gpu: .venv/.stamp
	TEST_GPU=1 .venv/bin/python -m pytest tests/gpu -s $(ARGS)

# What runs on our own server with two front ends instead of the transports that `make test` takes.
test-front-ends: .venv/.stamp
	TEST_FRONT_ENDS=1 .venv/bin/python -m pytest tests/integration tests/contract tests/faults tests/oip -k relayed $(ARGS)

test-image: .venv/.stamp
	TEST_IMAGE=1 .venv/bin/python -m pytest tests/deploy/test_image.py $(ARGS)

test-routing: .venv/.stamp .venv-routing/.stamp
	TEST_ROUTING=1 ENVOY=$(CURDIR)/.venv-routing/bin/envoy .venv/bin/python -m pytest tests/deploy/test_routing.py $(ARGS)

dashboard: | python
	@$(PYTHON) deploy/monitoring/dashboard.py

vocabulary: .venv/.stamp
	.venv/bin/python -m tenuto.serving.manifest.page docs

locks: .venv-locks/.stamp
	.venv-locks/bin/python deploy/image/lock.py

bom: .venv-locks/.stamp
	@mkdir -p build
	@for lock in cpu-x86_64 cpu-aarch64 cuda-x86_64; do \
	  .venv-locks/bin/python -W ignore -m cyclonedx_py requirements deploy/image/locks/$$lock.txt --pyproject pyproject.toml \
	    --output-reproducible --of JSON -o build/bom-$$lock.json && echo build/bom-$$lock.json; done

audit: .venv-locks/.stamp
	@for lock in cpu-x86_64 cpu-aarch64 cuda-x86_64; do \
	  .venv-locks/bin/pip-audit --strict --disable-pip --no-deps -r deploy/image/locks/$$lock.txt || exit 1; done

manifests:
	@for overlay in cpu gpu kind; do \
	  deploy/kubernetes/render.sh deploy/kubernetes/overlays/$$overlay || exit 1; echo ---; done

# The client as users get it: its wheel with its base dependencies, and tests that see no source tree.
CLIENT_TESTS = tests/oldest $(wildcard tests/client)
define test_wheel
rm -rf $(1)/wheel $(1)/run && mkdir -p $(1)/run/tests
$(1)/bin/python -m pip --disable-pip-version-check wheel --quiet --no-deps -w $(1)/wheel .
$(1)/bin/python -m pip --disable-pip-version-check install --quiet --force-reinstall --no-deps $(1)/wheel/*.whl
cp pyproject.toml $(1)/run/ && cp tests/conftest.py $(1)/run/tests/ && cp -R $(CLIENT_TESTS) $(1)/run/tests/
$(1)/bin/python -m pip --disable-pip-version-check list | grep -E '^(grpcio|numpy|protobuf|tenuto) '
cd $(1)/run && ../bin/python -m pytest $(ARGS)
endef

test-oldest: .venv-oldest/.stamp .venv-newest/.stamp
	$(call test_wheel,.venv-oldest)
	$(call test_wheel,.venv-newest)

lint: .venv/.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/.stamp
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

types: .venv/.stamp
	.venv/bin/mypy

# --- stubs ------------------------------------------------------------------------------------------

# $(1): the folder to write into
define write_stubs
.venv-stubs/bin/python -m grpc_tools.protoc -Iproto \
  --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)
endef

stubs: .venv-stubs/.stamp
	$(call write_stubs,.)

check-stubs: .venv-stubs/.stamp
	@rm -rf .venv-stubs/fresh && mkdir -p .venv-stubs/fresh
	@$(call write_stubs,.venv-stubs/fresh)
	@cd .venv-stubs/fresh && for file in $$(find tenuto -type f); do \
	  cmp $$file ../../$$file || { echo "error: STUBS_STALE: $$file is not what proto/ gives; run: make stubs" >&2; exit 1; }; done
	@echo 'stubs are fresh'

clean:
	rm -rf .venv .venv-* build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
