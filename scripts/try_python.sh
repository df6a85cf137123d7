#!/usr/bin/env bash
# The README's two commands with another Python, in a fresh environment and on a copy of what is committed.
#
#     scripts/try_python.sh PYTHON [--no-tests]      e.g. ~/.pyenv/versions/3.13.0/bin/python
#
# llama-cpp-python is built from source for each Python: three to six minutes on two cores, and a C++ compiler. torch
# comes with CUDA from PyPI, some 3 GB, unless PIP_FIND_LINKS or PIP_INDEX_URL leads to builds without it. The last line
# of stdout is one JSON document: versions, seconds of each step.
set -euo pipefail
shopt -s inherit_errexit # a step that fails inside $(...) ends the script, too
[ $# -ge 1 ] || { sed -n '2,8p' "$0" >&2; exit 2; }
python=$1 tests=${2:-}
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

seconds() { # runs a command with its output on stderr; how long it took
    local start=$SECONDS
    "$@" >&2
    echo $((SECONDS - start))
}

"$python" -m venv "$place/environment"
. "$place/environment/bin/activate"
mkdir "$place/tree"
git -C "$root" archive HEAD | tar -x -C "$place/tree"
export LOCALRUN_CACHE="$place/kernels" # so that all kernels are compiled by this Python

cd "$place/tree"
install=$(seconds pip install -q .)
cd "$place" # so that what runs is what was installed
generate=$(seconds localrun generate -p "Once upon a time, there was a little girl named Lily." -n 200 --seed 2)
chat=$(seconds localrun chat --temp 0 -n 48 <<< "Once upon a time")
suite=null
if [ "$tests" != --no-tests ]; then
    cd "$place/tree"
    pip install -q -e '.[demo,test]' >&2
    suite=$(seconds pytest -q)
fi
cd "$place"
python - "$install" "$generate" "$chat" "$suite" << 'END'
import importlib.metadata as metadata
import json
import platform
import sys

versions = {name: metadata.version(name) for name in ("torch", "numba", "numpy", "llama-cpp-python", "typer")}
steps = dict(zip(("install", "generate", "chat", "tests"), map(json.loads, sys.argv[1:]), strict=True))
print(json.dumps({"python": platform.python_version(), "versions": versions, "seconds": steps}))
END
