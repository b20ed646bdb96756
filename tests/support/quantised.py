"""Tiny quantised checkpoints in every format that is read, and the values that they stand for.

The libraries write what they can write on a CPU: compressed-tensors and bitsandbytes. The others are written here, from
the published layouts, entry by entry where it matters, so that no code is shared with `checkpoint.dequantise`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Parts = dict[str, Tensor]


def fp8_blocks(name: str, W: Tensor, block: tuple[int, int] = (128, 128)) -> Parts:
    """X.weight and X.weight_scale_inv of DeepSeek: one scale for each block, the last block cut short."""
    m, n = W.shape
    scale = torch.empty(math.ceil(m / block[0]), math.ceil(n / block[1]))
    q = torch.empty(m, n, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = W[part].abs().max().clamp_min(1e-12) / 448
            q[part] = (W[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return {name: q, f"{name}_scale_inv": scale}


def fp8_static(name: str, W: Tensor) -> Parts:
    """X.weight, X.weight_scale_inv and X.activation_scale of Mistral: one number each, the scale in bfloat16."""
    scale = (W.abs().max() / 448).to(torch.bfloat16)
    q = (W / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    module = name.removesuffix(".weight")
    return {name: q, f"{name}_scale_inv": scale, f"{module}.activation_scale": torch.tensor(0.5, dtype=torch.bfloat16)}


def mxfp8(name: str, W: Tensor, scale_name: str = "weight_scale_inv", exponents: torch.dtype = torch.uint8) -> Parts:
    """Groups of 32 with an exponent each, as bytes or as E8M0."""
    groups = in_groups(W, 32)
    exponent = (groups.abs().amax(-1).clamp_min(1e-12) / 448).log2().ceil()
    q = (groups / exponent.exp2()[..., None]).flatten(1).to(torch.float8_e4m3fn)
    scale = (exponent + 127).to(torch.uint8).view(exponents)
    return {name: q, f"{name.removesuffix('.weight')}.{scale_name}": scale}


def in_groups(W: Tensor, size: int) -> Tensor:
    """W (..., n) as (..., n / size, size)."""
    return W.reshape(*W.shape[:-1], -1, size)


def fp4_codes(groups: Tensor) -> Tensor:
    """The 4-bit codes (..., group) nearest to values that are scaled already."""
    code = (groups.abs()[..., None] - E2M1).abs().argmin(-1)
    return (code + 8 * (groups < 0)).to(torch.uint8)


def low_first(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first one in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def fp4_experts(name: str, W: Tensor) -> Parts:
    """X.weight in I8 and X.scale in E8M0, as DeepSeek V4 stores its experts."""
    groups = in_groups(W, 32)
    exponent = (groups.abs().amax(-1).clamp_min(1e-12) / 6).log2().ceil()
    codes = low_first(fp4_codes(groups / exponent.exp2()[..., None]).flatten(1))
    scale = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return {name: codes.view(torch.int8), f"{name.removesuffix('.weight')}.scale": scale}


def mxfp4(name: str, P: Tensor) -> Parts:
    """P_blocks and P_scales of gpt-oss for P (experts, in, out): the codes are those of the transposed matrices."""
    groups = in_groups(P.mT, 32)
    exponent = (groups.abs().amax(-1).clamp_min(1e-12) / 6).log2().ceil()
    blocks = low_first(fp4_codes(groups / exponent.exp2()[..., None]))
    return {f"{name}_blocks": blocks, f"{name}_scales": (exponent + 127).to(torch.uint8)}


def rewrite(
    folder: Path,
    quantise: Callable[[str, Tensor], Parts | None],
    config: Mapping[str, Any],
    *,
    files: Callable[[str], str] | None = None,
) -> Path:
    """Replace the tensors of a checkpoint by the parts that `quantise` makes of them.

    Args:
        folder: A checkpoint; its tensors are given in float32.
        quantise: The parts of a tensor; None to keep it.
        config: Keys to set in config.json.
        files: The file for each stored tensor; None for that of the tensor that it was made of.
    """
    from safetensors.torch import load_file

    old = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    new: dict[str, Parts] = {name: {} for name in old}
    for file, tensors in old.items():
        for name, tensor in tensors.items():
            parts = quantise(name, tensor.float())
            for part, value in ({name: tensor} if parts is None else parts).items():
                new.setdefault(files(part) if files else file, {})[part] = value
    for path in folder.glob("*.safetensors"):
        path.unlink()
    weight_map: dict[str, str] = {}
    for file, tensors in new.items():
        if tensors:
            save_file({name: t.contiguous() for name, t in tensors.items()}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    return folder


# Whole models


LLAMA = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "sliding_window": 16,
    "layer_types": ["full_attention"],
}  # fmt: skip
_MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "deepseek": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", GPT_OSS),
}


def random_model(kind: str) -> Any:
    """A random model in bfloat16 whose weights have a standard deviation of 0.1."""
    import transformers

    cls, config, sizes = _MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes)).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model.eval()


def save_model(folder: Path, kind: str, shard: str = "40KB") -> Path:
    """An ordinary checkpoint of a random model in several files."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    random_model(kind).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def is_projection(name: str) -> bool:
    """Whether a tensor is a linear layer's weight that these formats quantise."""
    return "proj" in name and name.endswith(".weight")


def codes_apart(name: str) -> str:
    """Codes in the first of two files, their scales and all else in the second."""
    return f"model-0000{1 if 'proj.weight' in name and 'scale' not in name else 2}-of-00002.safetensors"


def save_fp8(folder: Path, kind: str = "llama", *, block: int = 32, files: Callable[[str], str] | None = None) -> Path:
    """FP8 in blocks, as DeepSeek, Qwen and MiniMax publish it."""
    config = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    return rewrite(
        save_model(folder, kind),
        lambda name, W: fp8_blocks(name, W, (block, block)) if is_projection(name) else None,
        {"quantization_config": config},
        files=files,
    )


def save_fp8_static(folder: Path) -> Path:
    """FP8 with one scale a tensor, as Mistral publishes it."""
    config = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    return rewrite(
        save_model(folder, "llama"),
        lambda name, W: fp8_static(name, W) if is_projection(name) else None,
        {"quantization_config": config},
    )


def save_mxfp8(folder: Path) -> Path:
    config = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    return rewrite(
        save_model(folder, "llama"),
        lambda name, W: mxfp8(name, W) if is_projection(name) else None,
        {"quantization_config": config},
    )


def save_gpt_oss(folder: Path) -> Path:
    """MXFP4 experts, as OpenAI publishes gpt-oss."""
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return rewrite(
        save_model(folder, "gpt_oss", "60KB"),
        lambda name, P: mxfp4(name, P) if name.endswith(("gate_up_proj", "down_proj")) and P.dim() == 3 else None,
        {"quantization_config": config},
    )


def save_fp4(folder: Path) -> Path:
    """FP4 experts with scales in E8M0 beside FP8 in blocks, as DeepSeek V4 is published, on DeepSeek V3's modules."""

    def quantise(name: str, W: Tensor) -> Parts | None:
        if ".mlp.experts." in name:
            return fp4_experts(name, W)
        return fp8_blocks(name, W, (16, 16)) if is_projection(name) else None

    config = {"quant_method": "fp8", "weight_block_size": [16, 16], "expert_dtype": "fp4"}
    return rewrite(save_model(folder, "deepseek"), quantise, {"quantization_config": config})


def save_nf4(folder: Path) -> Path:
    """NF4 that bitsandbytes packs, with scales that are quantised again, as transformers saves a 4-bit Llama."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantise(name: str, W: Tensor) -> Parts | None:
        if not is_projection(name):
            return None
        codes, state = bitsandbytes.functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
        return {name: codes, **{f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}}

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return rewrite(save_model(folder, "llama"), quantise, {"quantization_config": config})


def save_modelopt(folder: Path, algorithm: str) -> Path:
    """FP8 or NVFP4 of NVIDIA's ModelOpt, whose configuration is in a file of its own."""

    def quantise(name: str, W: Tensor) -> Parts | None:
        if not is_projection(name):
            return None
        module = name.removesuffix(".weight")
        if algorithm == "FP8":
            scale = W.abs().max() / 448
            return {
                name: (W / scale).to(torch.float8_e4m3fn), f"{module}.weight_scale": scale,
                f"{module}.input_scale": torch.tensor(0.1),
            }  # fmt: skip
        groups = in_groups(W, 16)
        whole = W.abs().max() / (6 * 448)
        scale = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
        codes = fp4_codes(groups / (scale.float() * whole)[..., None]).flatten(1)
        return {
            name: low_first(codes), f"{module}.weight_scale": scale, f"{module}.weight_scale_2": whole,
            f"{module}.input_scale": torch.tensor(0.1),
        }  # fmt: skip

    rewrite(save_model(folder, "llama"), quantise, {})
    content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, "exclude_modules": []}}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    return folder


_CT: Mapping[str, tuple[str, dict[str, Any]]] = {
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
    ),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 asymmetric": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4 channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "int4 asymmetric": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "int3": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
    "int8 packed": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
        },
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
}  # fmt: skip
CT_FORMATS = tuple(_CT)
# Every format that tests read: `quant_method`, who wrote the files of the test, whether there is a mixed base.
# scripts/write_docs.py writes them into docs/quantised.md.
FORMATS: Mapping[str, tuple[str, str, bool]] = {
    "FP8, blocks of any size, also cut short": ("fp8", "the test", True),
    "FP8, one scale for the tensor": ("fp8", "the test", True),
    "MXFP8, groups of 32 with an exponent": ("mxfp8", "the test", True),
    "FP4 experts, groups of 32, scales in E8M0": ("fp8", "the test", True),
    "MXFP4 experts of gpt-oss": ("mxfp4", "the test", True),
    **{f"compressed-tensors, {name}": ("compressed-tensors", "compressed-tensors", True) for name in _CT},
    "compressed-tensors, int2 to int8, columns in another order": ("compressed-tensors", "the test", True),
    "ModelOpt, FP8": ("modelopt", "the test", False),
    "ModelOpt, NVFP4": ("modelopt", "the test", False),
    "bitsandbytes, NF4 and FP4, scales quantised again or not": ("bitsandbytes", "bitsandbytes", False),
}


def save_compressed(folder: Path, scheme: str) -> Path:
    """A Llama that compressed-tensors itself quantises and saves; `scheme` is one of CT_FORMATS."""
    from compressed_tensors.compressors.model_compressors.model_compressor import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    form, settings = _CT[scheme]
    args = QuantizationArgs(**settings)
    model = random_model("llama")
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args, format=form)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], format=form))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            _calibrate(module, args)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, form)
    compressor.compress_model(model)
    model.save_pretrained(folder, max_shard_size="40KB")
    compressor.update_config(folder)
    return folder


def _calibrate(module: Any, args: Any) -> None:
    """Set the scales of a module from the largest and smallest weight of each group."""
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    W, whole = module.weight.float(), None
    dims: tuple[int, ...]
    if args.strategy == "block":
        m, n = args.block_structure
        parts, dims = W.reshape(W.shape[0] // m, m, W.shape[1] // n, n), (1, 3)
    elif args.group_size:
        parts, dims = in_groups(W, args.group_size), (2,)
    else:
        parts, dims = W, (1,) if args.strategy == "channel" else (0, 1)
    if hasattr(module, "weight_global_scale"):
        whole = generate_gparam(W.min(), W.max())
        module.weight_global_scale.data.copy_(whole)
    scale, zero = calculate_qparams(parts.amin(dims), parts.amax(dims), args, global_scale=whole)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
