#!/usr/bin/env bash
# Does today's output load with the stack that the MiLoRA authors pinned (transformers 4.46, PEFT 0.13)?
#
#   scripts/check_old_stack.sh        builds .venv-old beside .venv; `make test` or `make demo` first
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv-old/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv-old
    .venv-old/bin/python -m pip install --quiet --upgrade pip
    .venv-old/bin/python -m pip install --quiet torch==2.13.0 transformers==4.46.3 peft==0.13.2 'numpy<2.4'
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Small random models, made by the old stack itself and in several shards, so that the comparison is its own.
.venv-old/bin/python - "$work" <<'PYTHON'
import sys
import transformers as t

small = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
models = {
    "llama": t.LlamaForCausalLM(t.LlamaConfig(**small)),
    "qwen2": t.Qwen2ForCausalLM(t.Qwen2Config(**small, num_key_value_heads=2)),
    "gpt2": t.GPT2LMHeadModel(t.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128)),
}
for name, model in models.items():
    model.save_pretrained(f"{sys.argv[1]}/{name}", max_shard_size="100KB")
PYTHON

status=0
for model in llama qwen2 gpt2; do
    targets=(); [ "$model" = gpt2 ] && targets=(--target c_attn --target c_proj --target c_fc)
    .venv/bin/milora-init --model "$work/$model" --rank 8 --out "$work/$model-init" --quiet "${targets[@]}"
    for venv in .venv-old .venv; do
        echo -n "$model, "
        "$venv/bin/python" scripts/check_pair.py "$work/$model" "$work/$model-init" 2> "$work/log" \
            || { status=1; echo "$model FAILED under $venv"; cat "$work/log"; }
    done
done
exit $status
