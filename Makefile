# Two commands do everything: `make demo` and `make test`. Both make their own .venv first.
#
#   PYTHON=python3.12           another Python, 3.11 to 3.13
#   TORCH_BACKEND=cu130         with uv: another build of PyTorch than the CPU's
#   PIP_FLAGS='--index-url ...' with pip: where to take packages from, such as PyTorch's own CPU index

PYTHON ?= python3
TORCH_BACKEND ?= cpu
PIP_FLAGS ?=
BIN := .venv/bin

# The native kernels are required where there is a compiler: an error in them must not pass for a machine without one.
export LONGSHORT_REQUIRE_NATIVE ?= $(shell command -v $(CXX) >/dev/null 2>&1 && echo 1 || echo 0)
NATIVE := CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: demo test campaign style types pytest native sanitize bench-peers clean

demo: .venv/installed
	$(BIN)/longshort demo

test: style types pytest

style: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/installed
	$(BIN)/mypy

pytest: .venv/installed
	$(BIN)/pytest -n auto

# The long tests: kills, cuts, faults, flipped bits, hostile files. Results go to docs/campaign.md.
campaign: .venv/installed
	LONGSHORT_CAMPAIGN=1 $(BIN)/pytest -s -m campaign

# What others give on the same work, into benchmarks/results; installs them beside this environment.
#   TEXT=FILE                   for the peers that read one
bench-peers: .venv/installed
	$(BIN)/python benchmarks/peers/run.py $(if $(TEXT),--text $(TEXT))

# Compile the kernels anew after a change in csrc, showing every warning; needs CMake.
native:
	cmake -S . -B build/native -DLONGSHORT_WERROR=ON
	cmake --build build/native -j 2
	cmake --install build/native

# All of the sanitizers' runs; `make test` has the short ones.
sanitize: .venv/installed
	LONGSHORT_SANITIZE=all $(BIN)/pytest -s tests/test_sanitizers.py

# uv, where it is installed, can choose PyTorch's CPU build by itself; plain pip takes what its index offers.
.venv/installed: pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "$(PYTHON) is not Python 3.11 to 3.13; name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@if command -v uv >/dev/null && uv pip install --python $(BIN)/python --torch-backend $(TORCH_BACKEND) \
	    -c constraints.txt -e '.[dev]'; then :; \
	else \
	    echo "Installing with pip. (Without an index of CPU builds, PyTorch for Linux is gigabytes: see README.md.)"; \
	    $(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'; \
	fi
	@touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build
