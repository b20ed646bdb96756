"""Architectures that users fine-tune: the configuration of a tiny model of each, and the modules to adapt.

`test_architectures.py` initialises every family, loads the pair with the Auto class and trains one step.
`scripts/support_table.py` writes the table of docs/models.md from this list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMAGE = 60  # token id of an image patch

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GEMMA = {**_TEXT, "head_dim": 8, "tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 8}
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3, "embed_dim": 32, "out_hidden_size": 32,
    "fullatt_block_indexes": [1], "window_size": 16, "mlp_ratio": 2,
}  # fmt: skip
_BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

# One of each kind: linear layers, Conv1D, a fused projection, two stacks, an image tower, and three forms of experts.
UNLIKE = ("llama", "gpt2", "bloom", "t5", "llava", "mixtral", "deepseek_v3", "gpt_oss")
FUSED_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Attributes:
        architecture: The class named in config.json.
        config: The class of its config.
        sizes: Arguments of the config class.
        targets: Target modules in the tests.
        auto: The Auto class that users load the model with.
        note: A remark for the table of docs/models.md.
        inputs: The kind of model inputs: `text`, `image`, `qwen image`, `seq2seq` or `speech`.
        stored: The dtype of the published weights.
    """

    architecture: str
    config: str
    sizes: Mapping[str, Any]
    targets: tuple[str, ...]
    auto: str = "AutoModelForCausalLM"
    note: str = ""
    inputs: str = "text"
    stored: str = "bfloat16"


_LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", config="LlamaConfig", sizes=_TEXT, targets=_LLAMA_LIKE),
    "mistral": Family(
        architecture="MistralForCausalLM",
        config="MistralConfig",
        sizes={**_TEXT, "sliding_window": 16},
        targets=_LLAMA_LIKE,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        config="Qwen2Config",
        sizes=_TEXT,
        targets=_LLAMA_LIKE,
        note="biases stay as they are",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM", config="Qwen3Config", sizes={**_TEXT, "head_dim": 8}, targets=_LLAMA_LIKE
    ),
    "olmo2": Family(architecture="Olmo2ForCausalLM", config="Olmo2Config", sizes=_TEXT, targets=_LLAMA_LIKE),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM", config="Gemma2Config", sizes=_GEMMA, targets=_LLAMA_LIKE, note="tied head"
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM", config="Gemma3TextConfig", sizes=_GEMMA, targets=_LLAMA_LIKE, note="tied head"
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        config="Phi3Config",
        sizes=_TEXT,
        targets=("qkv_proj", "gate_up_proj", "down_proj"),
        note="fused projections, one adapter each",
    ),
    "gpt2": Family(
        stored="float32",
        architecture="GPT2LMHeadModel",
        config="GPT2Config",
        sizes={
            "vocab_size": 64,
            "n_embd": 32,
            "n_inner": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        targets=("c_attn", "c_proj", "c_fc"),
        note="Conv1D: stored (in, out)",
    ),
    "gpt_neox": Family(
        stored="float16",
        architecture="GPTNeoXForCausalLM",
        config="GPTNeoXConfig",
        sizes=_TEXT,
        targets=("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
        note="`embed_out` on disk",
    ),
    "falcon": Family(
        stored="float16",
        architecture="FalconForCausalLM",
        config="FalconConfig",
        sizes={**_TEXT, "ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2},
        targets=("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "opt": Family(
        stored="float16",
        architecture="OPTForCausalLM",
        config="OPTConfig",
        sizes={
            "vocab_size": 64,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "pad_token_id": 0,
        },
        targets=("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
        note="tied head",
    ),
    "bloom": Family(
        stored="float16",
        architecture="BloomForCausalLM",
        config="BloomConfig",
        sizes={"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        targets=("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
        note="tied head",
    ),
    "bert": Family(
        stored="float32",
        architecture="BertModel",
        config="BertConfig",
        sizes=_TEXT,
        targets=("query", "key", "value", "intermediate.dense", "output.dense"),
        auto="AutoModel",
        note="headless",
    ),
    "bert with a head": Family(
        stored="float32",
        architecture="BertForSequenceClassification",
        config="BertConfig",
        sizes={**_TEXT, "num_labels": 3},
        targets=("query", "key", "value"),
        auto="AutoModelForSequenceClassification",
    ),
    "roberta": Family(
        stored="float32",
        architecture="RobertaForMaskedLM",
        config="RobertaConfig",
        sizes={**_TEXT, "max_position_embeddings": 66, "tie_word_embeddings": True},
        targets=("query", "key", "value"),
        auto="AutoModelForMaskedLM",
    ),
    "t5": Family(
        stored="float32",
        architecture="T5ForConditionalGeneration",
        config="T5Config",
        sizes={
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        targets=("q", "k", "v", "wi", "wo"),
        auto="AutoModelForSeq2SeqLM",
        inputs="seq2seq",
    ),
    "bart": Family(
        stored="float32",
        architecture="BartForConditionalGeneration",
        config="BartConfig",
        sizes={
            **_BART,
            "max_position_embeddings": 64,
        },
        targets=("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
        auto="AutoModelForSeq2SeqLM",
        inputs="seq2seq",
    ),
    "whisper": Family(
        stored="float32",
        architecture="WhisperForConditionalGeneration",
        config="WhisperConfig",
        sizes={
            **_BART,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        targets=("q_proj", "v_proj", "fc1"),
        auto="AutoModelForSpeechSeq2Seq",
        inputs="speech",
    ),
    "gemma3": Family(
        architecture="Gemma3ForConditionalGeneration",
        config="Gemma3Config",
        sizes={
            "text_config": {**_GEMMA, "model_type": "gemma3_text"},
            "vision_config": {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_id": IMAGE,
            "image_token_index": IMAGE,
            "boi_token_index": 61,
            "eoi_token_index": 62,
            "tie_word_embeddings": True,
        },
        targets=_LLAMA_LIKE,
        auto="AutoModelForImageTextToText",
        inputs="image",
        note="text tower; tied head",
    ),
    "llava": Family(
        architecture="LlavaForConditionalGeneration",
        config="LlavaConfig",
        sizes={
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_id": IMAGE,
            "image_token_index": IMAGE,
            "vision_feature_layer": -2,
            "image_seq_length": 4,
            "tie_word_embeddings": False,
        },
        targets=_LLAMA_LIKE,
        auto="AutoModelForImageTextToText",
        inputs="image",
        note="text tower",
    ),
    "mistral3": Family(
        architecture="Mistral3ForConditionalGeneration",
        config="Mistral3Config",
        sizes={
            "text_config": {**_TEXT, "model_type": "mistral", "head_dim": 8},
            "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8},
            "image_token_id": IMAGE,
            "image_token_index": IMAGE,
            "spatial_merge_size": 1,
            "tie_word_embeddings": False,
        },
        targets=_LLAMA_LIKE,
        auto="AutoModelForImageTextToText",
        inputs="image",
        note="text tower",
    ),
    "qwen2_vl": Family(
        architecture="Qwen2VLForConditionalGeneration",
        config="Qwen2VLConfig",
        sizes={
            "text_config": {**_TEXT, "rope_parameters": _ROPE},
            "vision_config": {**_QWEN_VISION, "hidden_size": 32},
            "image_token_id": IMAGE,
            "vision_start_token_id": 61,
            "vision_end_token_id": 62,
            "video_token_id": 63,
            "tie_word_embeddings": False,
        },
        targets=_LLAMA_LIKE,
        auto="AutoModelForImageTextToText",
        inputs="qwen image",
        note="text tower",
    ),
    "qwen2_5_vl": Family(
        architecture="Qwen2_5_VLForConditionalGeneration",
        config="Qwen2_5_VLConfig",
        sizes={
            "text_config": {**_TEXT, "rope_parameters": _ROPE},
            "vision_config": _QWEN_VISION,
            "image_token_id": IMAGE,
            "vision_start_token_id": 61,
            "vision_end_token_id": 62,
            "video_token_id": 63,
            "tie_word_embeddings": False,
        },
        targets=_LLAMA_LIKE,
        auto="AutoModelForImageTextToText",
        inputs="qwen image",
        note="text tower",
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        config="MixtralConfig",
        sizes={**_TEXT, **_MOE},
        targets=("q_proj", "v_proj", *FUSED_EXPERTS),
        note="experts",
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        config="Qwen3MoeConfig",
        sizes={
            **_TEXT,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
        },
        targets=("q_proj", "v_proj", "down_proj", *FUSED_EXPERTS),
        note="experts and dense layers",
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        config="DeepseekV3Config",
        sizes={
            **_TEXT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        targets=("o_proj", "gate_proj", "up_proj", "down_proj", *FUSED_EXPERTS),
        note="experts, shared experts and dense layers",
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        config="GptOssConfig",
        sizes={**_TEXT, **_MOE, "head_dim": 8, "sliding_window": 16},
        targets=("q_proj", "v_proj", *FUSED_EXPERTS),
        note="experts, stored (in, out)",
    ),
    "llama4": Family(
        architecture="Llama4ForConditionalGeneration",
        config="Llama4Config",
        sizes={
            "text_config": {
                **_TEXT,
                **_MOE,
                "num_experts_per_tok": 1,
                "head_dim": 8,
                "intermediate_size_mlp": 48,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 16,
                "no_rope_layers": [1, 0],
            },
            "vision_config": {
                **_VISION,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "pixel_shuffle_ratio": 1.0,
            },
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
        targets=("q_proj", "v_proj", "down_proj", *FUSED_EXPERTS),
        auto="AutoModelForImageTextToText",
        note="text tower, experts and dense layers",
    ),
}
