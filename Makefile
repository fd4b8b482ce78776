# Self-sufficient on a fresh Debian 12 or Ubuntu 24.04 as root: every target installs what it is missing.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
# Extra words for pytest and for the benchmark, e.g. make test PYTEST_ARGS='tests/t0_unit -x'
PYTEST_ARGS ?=
BENCH_ARGS ?=
MINUTES ?= 10

.NOTPARALLEL:
.PHONY: compiled help run check test bench soak lint docs deb deb-test clean packages test-packages deb-packages

help:
	@echo "make run    mount the walk-through tree and serve it until Ctrl-C"
	@echo "make check  ruff, mypy --strict, the tests without mounts and one mount: two minutes, before every commit"
	@echo "make test   ruff, mypy --strict, every test, and a check that nothing was left behind"
	@echo "make bench  the benchmark beside other union file systems (QUICK=1: the short form; BENCH_ARGS=...)"
	@echo "make soak   every test with more rounds, examples and modes, then random changes for MINUTES=10"
	@echo "make lint   ruff, mypy and the documentation only"
	@echo "make docs   the documentation as a site in site/, readable without a network"
	@echo "make deb    a Debian package for this machine's release, in dist/; make deb-test: tried in a fresh system"
	@echo "make clean  remove the virtual environment and the caches"

packages:
	@.ci/install-debian.sh run

test-packages:
	@.ci/install-debian.sh run test

deb-packages:
	@.ci/install-debian.sh run deb

# The packages come first: building pyfuse3 needs a compiler and libfuse3's headers.
$(VENV)/.stamp: pyproject.toml setup.py .ci/venv.sh | packages
	@.ci/venv.sh "$(PYTHON)" $(VENV)
	@touch $@

# Compiled modules that were made from other sources are made anew; where there are none, in less than a minute.
compiled: $(VENV)/.stamp
	@.ci/compile.sh $(VENV)

run: compiled
	@config/walkthrough.sh

lint: $(VENV)/.stamp
	@.ci/lint.sh

docs: $(VENV)/.stamp
	@.ci/docs.sh

check: test-packages compiled
	@.ci/check.sh

# Lints, too, unless PYTEST_ARGS choose some tests.
test: test-packages compiled
	@.ci/test.sh $(PYTEST_ARGS)

bench: test-packages compiled
	$(VENV)/bin/python -m tests.bench $(if $(QUICK),--quick) $(BENCH_ARGS)

# In a mount namespace of its own, without copies of other unions: a copy keeps a daemon from ending.
soak: test-packages compiled
	@UDBAD_TEST_PROFILE=soak .ci/test.sh $(PYTEST_ARGS)
	unshare --mount --propagation private bash -c ' \
	    findmnt --raw --noheadings --output TARGET --types fuse.udba | \
	        while IFS= read -r target; do umount --lazy -- "$$(printf %b "$$target")"; done; \
	    exec $(VENV)/bin/python -m tests.stress.soak --minutes $(MINUTES)'

deb: deb-packages
	@.ci/build-deb.sh

deb-test: test-packages deb $(VENV)/.stamp
	UDBAD_DEB=$$(ls -t $$PWD/dist/udbad_*.deb | head -n 1) .ci/pytest.sh tests/system/test_package.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site udbad/compiled.txt
	find udbad -name '*.so' -delete
