# Every target first makes the machine ready: .ci/install takes a moment when nothing is missing.

export PATH := $(CURDIR)/.venv/bin:$(PATH)
PREFIX ?= /usr/local
wheelhouse = $(or $(WHEELS),.cache/wheels)

.PHONY: all ready demo test lint fmt test-tools bench torture wheels install uninstall deb test-deb clean

all: ready

ready:
	@.ci/install

# A guest's memory as files, a save, a lazy restore: told step by step.
demo: ready
	@examples/demo

# One process for each core takes tests from the others when it runs out of its own.
test: lint
	pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal

lint: ready
	ruff check .
	ruff format --check .
	mypy
	lint-imports

fmt: ready
	ruff check --fix .
	ruff format .

# What many programs and commands do to a mount at once, for hours if need be: make torture MINUTES=60 SEED=1
torture: ready
	python -m tests.torture $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(TORTURES)

# Debuggers that need the symbols of the guest's kernel: a download of 283 MB at the first time.
test-tools: ready
	@.ci/install tools
	pytest tests/physical/symbols.py

bench: ready
	python -m tests.benchmarks --file-systems --plot docs/pictures/benchmarks.png $(if $(QUICK),--quick)

# What is installed, as wheels for this machine's Python: all of it, so that `make install WHEELS=DIR` needs no network.
wheels:
	@.ci/install wheels "$(wheelhouse)"

# The program in $(PREFIX), and mount(8)'s helper in /sbin: see mount-helpers/README.md. DESTDIR is honoured.
install: $(if $(WHEELS),,wheels)
	mount-helpers/install "$(DESTDIR)" "$(PREFIX)" "$(wheelhouse)"

uninstall:
	mount-helpers/uninstall "$(DESTDIR)" "$(PREFIX)"

# A package for the Debian that this runs on, in dist/.
deb:
	@.ci/install deb "$(wheelhouse)"
	mount-helpers/deb "$(wheelhouse)" dist

# The same in a clean tree of Debian; as root. make test-deb SUITES=trixie
SUITES ?= bookworm trixie
test-deb:
	set -e; for suite in $(SUITES); do tests/packages/in_debian $$suite; done

clean:
	rm -rf --one-file-system .venv .cache dist .*_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
