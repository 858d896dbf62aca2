#!/usr/bin/env bash
# install.sh DIRECTORY: vLLM and SGLang for machines without a GPU, about 5 GB; done once.
# pip must know a place that offers torch 2.13.0+cpu (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
cd "$1"
if [[ -e done-1 ]]; then exit 0; fi
"${PYTHON:-python3}" -m venv vllm
pip="$PWD/vllm/bin/python -m pip --disable-pip-version-check --quiet"
$pip install --no-deps -r "$here/requirements-vllm.txt"
$pip install --no-deps --target sglang -r "$here/requirements-sglang.txt"
touch done-1
