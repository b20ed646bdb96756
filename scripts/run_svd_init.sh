#!/usr/bin/env bash
# The counterpart of the MiLoRA authors' run_svd_init.sh: a residual base and an adapter for each of their two recipes.
#
#   scripts/run_svd_init.sh                                    Llama-2-7B, rank 64, min
#   MODEL=./my-model RANK=32 MODE=max OUT=./bases scripts/run_svd_init.sh
#
# After an interruption run it again: finished outputs are kept.
set -euo pipefail

MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
RANK=${RANK:-64}
MODE=${MODE:-min}
OUT=${OUT:-./svd_init_models}

for recipe in llm-adapters qlora; do
    milora-init --model "$MODEL" --rank "$RANK" --mode "$MODE" --recipe "$recipe" \
        --out "$OUT/$recipe-rank-$RANK-$MODE" "$@"
done
