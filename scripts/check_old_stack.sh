#!/usr/bin/env bash
# Check that old versions of transformers and PEFT load the output, and that milora-init runs on the oldest supported.
#
#   scripts/check_old_stack.sh        needs .venv, from `make test` or `make demo`; builds .venv-old-*
#
# 4.46  the versions of the MiLoRA authors: transformers 4.46 with PEFT 0.13 loads an output of milora-init in .venv
# 5.0   the oldest in pyproject.toml: milora-init runs on it, and the output loads there
# 5.1   the oldest that can train experts: the same, with all weights of Mixtral
set -euo pipefail
cd "$(dirname "$0")/.."

# Arguments: name, transformers version, PEFT version, any text to install milora-init too
build() {
    [ -x ".venv-old-$1/bin/python" ] && return
    "${PYTHON:-python3}" -m venv ".venv-old-$1"
    ".venv-old-$1/bin/python" -m pip install --quiet --upgrade pip
    ".venv-old-$1/bin/python" -m pip install --quiet torch==2.13.0 "transformers==$2" "peft==$3" 'numpy<2.4' ${4:+-e .}
}
build 4.46 4.46.3 0.13.2
build 5.0 5.0.0 0.18.0 tool
build 5.1 5.1.0 0.19.1 tool

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Small random models in several shards, saved by the versions that will load them.
models() {
    mkdir -p "$work/$1"
    ".venv-old-$1/bin/python" - "$work/$1" <<'PYTHON'
import sys
import transformers as t

t.utils.logging.disable_progress_bar()
small = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
models = {
    "llama": t.LlamaForCausalLM(t.LlamaConfig(**small)),
    "qwen2": t.Qwen2ForCausalLM(t.Qwen2Config(**small, num_key_value_heads=2)),
    "gpt2": t.GPT2LMHeadModel(t.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128)),
    "mixtral": t.MixtralForCausalLM(t.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=4)),
}
for name, model in models.items():
    model.save_pretrained(f"{sys.argv[1]}/{name}", max_shard_size="100KB")
PYTHON
}

status=0
check() { # arguments: the venv of milora-init, the name of the venv that loads the output, the model, its targets
    local tool=$1 stack=$2 model=$3 targets=() out
    shift 3
    for target in "$@"; do targets+=(--target "$target"); done
    out="$work/$stack/$model-init"
    "$tool/bin/milora-init" --model "$work/$stack/$model" --rank 8 --out "$out" --quiet "${targets[@]}"
    for venv in ".venv-old-$stack" .venv; do
        echo -n "$model, "
        HF_HUB_OFFLINE=1 "$venv/bin/python" scripts/check_pair.py "$work/$stack/$model" "$out" 2> "$work/log" \
            || { status=1; echo "$model FAILED under $venv"; cat "$work/log"; }
    done
}

models 4.46
for model in llama qwen2 mixtral; do check .venv 4.46 "$model" q_proj k_proj v_proj; done
check .venv 4.46 gpt2 c_attn c_proj c_fc
models 5.0
for model in llama qwen2; do check .venv-old-5.0 5.0 "$model" q_proj k_proj v_proj up_proj down_proj; done
check .venv-old-5.0 5.0 mixtral q_proj k_proj v_proj
models 5.1
for model in llama qwen2; do check .venv-old-5.1 5.1 "$model" all-linear; done
check .venv-old-5.1 5.1 mixtral all-linear experts
exit $status
