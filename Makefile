# Two commands for a newcomer: `sudo make demo` and `sudo make test`; each sets up all it needs.

PYTHON := .venv/bin/python

QUICK :=
PACKETS := 100000000
SECONDS := 600

.PHONY: setup demo bench soak test fuzz lint format clean

setup:
	bash .ci/setup

demo: setup
	$(PYTHON) -m bench.demo

bench: setup
	$(PYTHON) -m bench $(if $(QUICK),--quick)

soak: setup
	$(PYTHON) -m bench.soak $(PACKETS)

# Most tests wait rather than compute, so three run beside each other, each file in one process; those
# that measure a time, a rate or a loss run afterwards, one by one.
test: setup
	status=0; \
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not alone" || status=$$?; \
	$(PYTHON) -m pytest -m alone || status=$$?; \
	exit $$status

fuzz: setup
	$(MAKE) -C tests/fastpath fuzz SECONDS=$(SECONDS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy -p pyflannel
	.venv/bin/mypy tests bench
	clang-format --dry-run -Werror $$(git ls-files '*.c' '*.h' ':!:dataplane/_fastpath_abi.h')

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	clang-format -i $$(git ls-files '*.c' '*.h' ':!:dataplane/_fastpath_abi.h')

clean:
	rm -rf .venv bench/bin tests/fastpath/bin build dist src/*.egg-info dataplane/*.so .mypy_cache .ruff_cache .pytest_cache
