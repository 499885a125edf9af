#!/usr/bin/env bash
# The main job on real adapters of SmolLM2-135M: merge, see what was lost, cut to a rank or an error.
set -euo pipefail
adapters=$(cd "$(dirname "$0")/adapters" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
ln -s "$adapters"/*/ .

show() {
    printf '$ %s\n' "$*"
    "$@"
    echo
}

show adapterops merge code-seed0 code-seed1 docs-seed0 docs-seed1 --weights 1,1,1,1 --normalize \
    --max-error 0.1 -o four
show adapterops merge code-seed0 docs-seed0 --weights 0.7,0.3 --rank same -o rank8
show adapterops merge code-seed0 docs-seed0 --weights 0.7,0.3
