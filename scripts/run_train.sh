#!/usr/bin/env bash
# Train a method, then evaluate what was trained.
#
#   scripts/run_train.sh METHOD BASE SAVE_ROOT [options of train.py] [-- options of evaluate.py]
#
#   milora-init --model meta-llama/Llama-2-7b-hf --recipe math --out svd_init
#   scripts/run_train.sh milora svd_init runs/milora
#   scripts/run_train.sh lora meta-llama/Llama-2-7b-hf runs/lora
#
# scripts/train.py --help and scripts/evaluate.py --help list the options.
#
# One process for each visible GPU (NPROC sets another number). The exit status is the one of the step that failed:
# a failed training is not evaluated.
set -euo pipefail

usage() { # the comment above
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

train=()
while (($#)) && [[ $1 != -- ]]; do
    train+=("$1")
    shift
done
(($#)) && shift
for word in ${train[@]+"${train[@]}"} "$@"; do
    [[ $word == -h || $word == --help ]] && usage && exit 0
done
if ((${#train[@]} < 3)) || [[ ${train[0]}${train[1]} == -* || ${train[2]} == -* ]]; then
    usage >&2
    exit 2
fi
save_root=${train[2]}

launcher=("$python")
nproc=${NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
if ((nproc > 1)); then
    launcher=("$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc")
fi

"${launcher[@]}" "$here/train.py" ${train[@]+"${train[@]}"}
"$python" "$here/evaluate.py" "$save_root" "$@"
