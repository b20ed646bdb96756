#!/usr/bin/env bash
# The authors' run_svd_init.sh in this program's terms: one residual base and adapter for each of their two recipes.
#
#   scripts/run_svd_init.sh                                    Llama-2-7B, rank 64, min
#   MODEL=./my-model RANK=32 MODE=max OUT=./bases scripts/run_svd_init.sh
#
# Run again after an interruption: what is finished is left as it is.
set -euo pipefail

MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
RANK=${RANK:-64}
MODE=${MODE:-min}
OUT=${OUT:-./svd_init_models}

for recipe in llm-adapters qlora; do
    milora-init --model "$MODEL" --rank "$RANK" --mode "$MODE" --config "$recipe" \
        --out "$OUT/$recipe-rank-$RANK-$MODE" "$@"
done
