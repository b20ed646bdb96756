"""Values of quantised tensors: against plain loops, and bit for bit against what transformers loads."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import quantised
from torch import Tensor

from milora_init.checkpoint.dequantise import QuantisedSource, locate
from milora_init.checkpoint.folder import Checkpoint, open_model
from milora_init.errors import CheckpointError

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def stored(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Checkpoint:
    """A folder with these tensors and this quantization_config; no model could be built of it."""
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    return open_model(folder)


def value(checkpoint: Checkpoint, name: str) -> Tensor:
    source = locate(checkpoint, name)
    assert isinstance(source, QuantisedSource)
    return source.read()


@pytest.mark.parametrize(("m", "n"), [(576, 7168), (192, 256), (128, 128), (5, 300), (129, 1), (300, 131)])
def test_blocks_that_are_cut_short_have_their_own_scale(m: int, n: int, tmp_path: Path) -> None:
    """DeepSeek's kv_a_proj_with_mqa has 576 rows: the last block has 64. A plain loop over all blocks is the truth."""
    torch.manual_seed(0)
    q = (torch.randn(m, n) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(math.ceil(m / 128), math.ceil(n / 128)) + 0.5
    found = value(stored(tmp_path / "x", {"a.weight": q, "a.weight_scale_inv": scale}, FP8), "a.weight")
    truth = torch.empty(m, n)
    for top in range(0, m, 128):
        for left in range(0, n, 128):
            block = q[top : top + 128, left : left + 128].float()
            truth[top : top + 128, left : left + 128] = block * scale[top // 128, left // 128]
    assert found.dtype is torch.float32
    assert torch.equal(found, truth)


def reference(folder: Path) -> dict[str, Tensor]:
    """The dense tensors that transformers loads from a quantised checkpoint, in bfloat16."""
    import transformers

    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    options: dict[str, Any] = {}
    if method == "mxfp4":
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    if method == "compressed-tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    found: dict[str, Tensor] = model.state_dict()
    for name in [name for name in found if method == "fp8" and ".experts." in name]:  # that transformers has fused
        experts, _, part = name.rpartition(".")
        for number, matrix in enumerate(found.pop(name)):
            halves = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {part: 0}
            for proj, half in halves.items():
                found[f"{experts}.{number}.{proj}.weight"] = matrix.chunk(len(halves))[half]
    return found


WRITERS: dict[str, Callable[[Path], Path]] = {
    "fp8 blocks": quantised.save_fp8,
    "fp8 static": quantised.save_fp8_static,
    "mxfp8": quantised.save_mxfp8,
    "fp4 experts": quantised.save_fp4,
    "gpt_oss": quantised.save_gpt_oss,
    **{f"ct {name}": partial(quantised.save_compressed, scheme=name) for name in quantised.CT_FORMATS},
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_value_rounds_to_what_transformers_loads(name: str, tmp_path: Path) -> None:
    """compressed-tensors writes its own files. Not one bit of one entry may differ."""
    folder = WRITERS[name](tmp_path / "model")
    checkpoint, expected = open_model(folder), reference(folder)
    assert checkpoint.tensors.keys() == expected.keys()
    assert len(checkpoint.quantised.tensors) >= 2
    for tensor in checkpoint.quantised.tensors:
        assert checkpoint.tensors[tensor].shape == expected[tensor].shape
        ours = value(checkpoint, tensor).to(torch.bfloat16)
        assert torch.equal(ours.view(torch.int16), expected[tensor].contiguous().view(torch.int16)), tensor


def bits_of(codes: list[list[int]], bits: int) -> Tensor:
    """Rows of codes as a little-endian stream of bits in words of 32 bits, written one bit after the other."""
    rows = []
    for row in codes:
        stream = [(code >> bit) & 1 for code in row for bit in range(bits)]
        stream += [0] * (-len(stream) % 32)
        words = [sum(bit << i for i, bit in enumerate(stream[at : at + 32])) for at in range(0, len(stream), 32)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("form", ["symmetric", "asymmetric", "ordered", "channel"])
def test_packed_integers_of_every_width(bits: int, form: str, tmp_path: Path) -> None:
    """Against codes that are packed bit by bit; also with zero points, in another order of columns, and odd widths."""
    torch.manual_seed(bits)
    m, n, group = 6, (37 if form == "channel" else 48), 16
    groups = 1 if form == "channel" else n // group
    codes = torch.randint(0, 1 << bits, (m, n))
    scale = torch.rand(m, groups) + 0.5
    zeros = torch.randint(0, 1 << bits, (m, groups))
    order = torch.randperm(n) // group if form == "ordered" else torch.arange(n) // (n // groups)
    tensors = {
        "a.weight_packed": bits_of(codes.tolist(), bits), "a.weight_scale": scale.to(torch.bfloat16),
        "a.weight_shape": torch.tensor([m, n]),
    }  # fmt: skip
    if form == "asymmetric":
        tensors["a.weight_zero_point"] = bits_of(zeros.T.tolist(), bits).T
    if form == "ordered":
        tensors["a.weight_g_idx"] = order.to(torch.int32)
    weights = {
        "num_bits": bits, "type": "int", "symmetric": form != "asymmetric",
        **({"strategy": "channel"} if form == "channel" else {"strategy": "group", "group_size": group}),
    }  # fmt: skip
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    checkpoint = stored(tmp_path / "x", tensors, config)
    shift = zeros if form == "asymmetric" else torch.full((m, groups), 1 << (bits - 1))
    truth = torch.empty(m, n)
    for i in range(m):
        for j in range(n):
            g = int(order[j])
            truth[i, j] = float(codes[i, j] - shift[i, g]) * float(tensors["a.weight_scale"][i, g])
    assert torch.equal(value(checkpoint, "a.weight"), truth)


def test_fp4_experts_of_deepseek_v4(tmp_path: Path) -> None:
    """I8 codes with scales in E8M0 called `.scale`, beside FP8 with a scale of the same name; against transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    W = torch.randn(48, 96)
    experts = quantised.fp4_experts("layers.0.ffn.experts.0.w1.weight", W)
    linear = quantised.mxfp8("layers.0.attn.wq_a.weight", torch.randn(32, 64), "scale", torch.float8_e8m0fnu)
    real = {"layers.0.hc.scale": torch.ones(3), "layers.0.ffn.gate.tid2eid": torch.zeros(9, 2, dtype=torch.int32)}
    config = {"quant_method": "fp8", "weight_block_size": [1, 32], "expert_dtype": "fp4"}
    checkpoint = stored(tmp_path / "x", {**experts, **linear, **real}, config)
    assert set(checkpoint.tensors) == {"layers.0.ffn.experts.0.w1.weight", "layers.0.attn.wq_a.weight", *real}
    for parts in (experts, linear):
        (name, codes), (_, scale) = parts.items()
        truth = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=torch.float32)
        assert torch.equal(value(checkpoint, name), truth)


def test_a_fused_tensor_of_experts_has_a_grid_for_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q, scale = torch.randn(3, 40, 72).to(torch.float8_e4m3fn), torch.rand(3, 2, 3)
    static, one, shared = torch.randn(3, 8, 8).to(torch.float8_e4m3fn), torch.rand(3), torch.rand(1, 1, 1)
    tensors = {"e.up": q, "e.up_scale_inv": scale, "e.down": static, "e.down_scale_inv": one}
    tensors |= {"e.all": static.clone(), "e.all_scale_inv": shared}
    checkpoint = stored(tmp_path / "x", tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    source = locate(checkpoint, "e.up")
    whole = source.read()
    for e in range(3):
        grid = scale[e].repeat_interleave(32, 0)[:40].repeat_interleave(32, 1)[:, :72]
        assert torch.equal(whole[e], q[e].float() * grid)
        assert torch.equal(source.at(e).read(), whole[e])
        assert torch.equal(locate(checkpoint, "e.down").at(e).read(), static[e].float() * one[e])
        assert torch.equal(locate(checkpoint, "e.all").at(e).read(), static[e].float() * shared[0, 0])


@pytest.mark.parametrize("block", [[128, 1 << 50], [1 << 50, 128], [1 << 60, 1 << 60]])
def test_a_block_larger_than_the_matrix_is_the_matrix(block: list[int], tmp_path: Path) -> None:
    q, scale = torch.randn(8, 8).to(torch.float8_e4m3fn), torch.rand(1, 1)
    config = {"quant_method": "fp8", "weight_block_size": block}
    checkpoint = stored(tmp_path / "x", {"a.weight": q, "a.weight_scale_inv": scale}, config)
    assert torch.equal(value(checkpoint, "a.weight"), q.float() * scale)


@pytest.mark.parametrize("name", ["fp8 blocks", "gpt_oss", "ct int4 asymmetric", "ct nvfp4"])
def test_blocks_of_rows_are_the_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are decoded at a time: also a few that do not end where a scale does."""
    checkpoint = open_model(WRITERS[name](tmp_path / "model"))
    tensor = next(iter(checkpoint.quantised.tensors.values()))
    source = locate(checkpoint, tensor.name)
    source = source if len(tensor.shape) == 2 else source.at(1)
    assert isinstance(source, QuantisedSource)
    whole = source.read()
    monkeypatch.setattr("milora_init.checkpoint.dequantise._BLOCK_ELEMENTS", 7 * tensor.matrix[1])
    assert torch.equal(source.read(), whole)
    assert torch.equal(torch.cat([values.clone() for _, _, values in source.blocks()]), whole)


@pytest.mark.parametrize("bad", ["code", "scale", "infinite scale", "exponent"])
def test_nan_and_inf_are_refused_by_name(bad: str, tmp_path: Path) -> None:
    q, scale = torch.ones(8, 8).to(torch.float8_e4m3fn), torch.ones(1, 1)
    if bad == "code":
        q.view(torch.uint8)[3, 4] = 0x7F
    elif bad == "exponent":
        scale = torch.full((1, 1), 255, dtype=torch.uint8)
    else:
        scale[0, 0] = float("nan" if bad == "scale" else "inf")
    checkpoint = stored(tmp_path / "x", {"a.weight": q, "a.weight_scale_inv": scale}, FP8)
    with pytest.raises(CheckpointError, match=r"a\.weight holds NaN or Inf"):
        value(checkpoint, "a.weight")


@pytest.mark.parametrize("group", [-1, 3, 1 << 30])
def test_a_column_of_a_group_that_is_not_there_is_refused(group: int, tmp_path: Path) -> None:
    order = torch.arange(48, dtype=torch.int32) // 16
    order[5] = group
    tensors = {
        "a.weight_packed": torch.zeros(6, 6, dtype=torch.int32), "a.weight_scale": torch.ones(6, 3),
        "a.weight_shape": torch.tensor([6, 48]), "a.weight_g_idx": order,
    }  # fmt: skip
    weights = {"num_bits": 4, "strategy": "group", "group_size": 16}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    with pytest.raises(CheckpointError, match=r"weight_g_idx names a group .* it has 3"):
        value(stored(tmp_path / "x", tensors, config), "a.weight")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_codes_of_bitsandbytes(kind: str, double: bool, tmp_path: Path) -> None:
    """Against the library that wrote them. 64-entry groups run through the entries, so a row may end inside one."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    for name, shape in (("a", (96, 64)), ("b", (50, 36))):
        W = torch.randn(shape)
        codes, state = bnb.functional.quantize_4bit(W, quant_type=kind, compress_statistics=double)
        tensors = {f"{name}.weight": codes}
        tensors |= {f"{name}.weight.{key}": t.contiguous() for key, t in state.as_dict(packed=True).items()}
        checkpoint = stored(tmp_path / name, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
        assert list(checkpoint.tensors) == [f"{name}.weight"]
        expected = bnb.functional.dequantize_4bit(codes, state)
        assert torch.equal(value(checkpoint, f"{name}.weight"), expected.float())


@pytest.mark.parametrize("change", [{"nested_blocksize": 1 << 40}, {"nested_offset": 10**400}, {"nested_offset": "x"}])
def test_a_state_of_bitsandbytes_with_impossible_numbers(change: dict[str, Any], tmp_path: Path) -> None:
    """It is refused, or read without more memory than the weight has."""
    bnb = pytest.importorskip("bitsandbytes")
    codes, state = bnb.functional.quantize_4bit(torch.randn(96, 64), quant_type="nf4", compress_statistics=True)
    tensors = {"a.weight": codes} | {f"a.weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    name = "a.weight.quant_state.bitsandbytes__nf4"
    content = json.loads(bytes(tensors[name].tolist())) | change
    tensors[name] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    if "nested_blocksize" in change:
        expected = bnb.functional.dequantize_4bit(codes, state)
        assert torch.equal(value(stored(tmp_path / "x", tensors, config), "a.weight"), expected)
        return
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        stored(tmp_path / "x", tensors, config)


def test_the_shape_that_is_stored_must_be_that_of_the_codes(tmp_path: Path) -> None:
    folder = quantised.save_compressed(tmp_path / "model", "int4")
    file = next(path for path in sorted(folder.glob("*.safetensors")) if "layers.1" in str(list(load_file(path))))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_shape"))
    tensors[name][1] -= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weight_shape says"):
        value(open_model(folder), name.removesuffix("_shape"))
