#!/usr/bin/env bash
# Merge two example adapters and run the result on SmolLM2-135M, against the exact weighted sum.
set -euo pipefail
examples=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
inputs=("$examples/adapters/code-seed0" "$examples/adapters/docs-seed0")

for options in "--dtype float32" "--dtype float16" "--dtype float16 --rank same"; do
    # shellcheck disable=SC2086  # the options are separate words
    adapterops merge "${inputs[@]}" --weights 0.7,0.3 $options -o "$work/merged" --overwrite -q
    echo "merge --weights 0.7,0.3 $options"
    python "$examples/verify_on_model.py" "$work/merged" --inputs "${inputs[@]}" --weights 0.7,0.3 \
        2>/dev/null
    echo
done
