#!/usr/bin/env bash
# Build the wheel, install it alone in a fresh environment, run the mission's command with it.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m pip wheel -q --no-deps -w "$work" .
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q "$work"/adapterops-*.whl
cd "$work"
"$work/venv/bin/python" "$OLDPWD/tests/make_pair.py" "$work"
export PATH="$work/venv/bin:$PATH"
adapterops --help >/dev/null
adapterops merge a.safetensors b.safetensors --weights 0.7,0.3
python - <<'PY'
import sys
import adapterops
report = adapterops.merge(["a.safetensors", "b.safetensors"], [0.7, 0.3], out="again.safetensors")
assert report.error < 1e-3, report.error
assert "torch" not in sys.modules, "a merge on the CPU must not import torch"
PY
echo "wheel: ok"
