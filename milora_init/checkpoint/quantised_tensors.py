"""Find the tensors of a quantised checkpoint: which stored tensors together hold one tensor of the model.

A quantised tensor is stored in parts: codes, scales, and in some formats zero points, a global scale, or an order of
the columns. They are found by names, dtypes and shapes; the configuration supplies block size, bits and symmetry. The
rest of the program sees one tensor with the name, the shape and the dtype that it would have in an ordinary checkpoint.

Nothing is guessed. A dtype without a rule, and a rule without one of its parts, is an error that names the tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from milora_init.checkpoint.header import FLOATS, SAFETENSORS_DTYPES, TensorInfo
from milora_init.checkpoint.quantisation import UNQUANTISED, Quantisation
from milora_init.errors import CheckpointError

RULES_VERSION = 1  # raised when a rule gives other values for the same bytes
Encoding = Literal["stored", "e2m1", "integer", "map"]
_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_EXPONENTS = ("F8_E8M0", "U8")
_INTEGERS = ("I8", "U8", "I16", "I32", "I64")
# One number for each module: scales of activations and of the KV cache. A dense model has no use for them.
ACTIVATIONS = (
    ".activation_scale", ".input_scale", ".input_zero_point", ".input_global_scale", ".qscale_act", ".output_scale",
    ".output_zero_point", ".q_scale", ".k_scale", ".v_scale", ".kv_scale", "_activation_scale", "_input_scale",
)  # fmt: skip
# Parts that belong to no weight are refused: their weight is missing, or stored in a way that no rule reads.
_ORPHANS = (
    ".weight_scale", "_scale_inv", ".qscale_weight", ".weight_scale_2", ".weight_zero_point", ".weight_packed",
    ".weight_shape", ".weight_g_idx", ".weight_global_scale", ".pre_quant_scale", ".absmax", ".quant_map", ".SCB",
    ".qweight", ".qzeros",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rule:
    """How the values of a tensor follow from its parts: float32(code) * float32(scale).

    Attributes:
        format: The format, in words.
        bits: Of one code.
        encoding: What a code means: `stored` is a number in the dtype of the tensor, `e2m1` a 4-bit float, `integer`
            an unsigned integer from which 2^(bits - 1) is subtracted, `map` an index into a table that is stored too.
        block: The rows and columns that share a scale; the last block of a row or column may be shorter.
        transposed: Whether the codes are those of the transposed matrix.
        divide: True if the scales are divided by the global scale, False if they are multiplied by it.
        nested_offset: What is added to scales that are quantised themselves.
        nested_block: How many of these quantised scales share one second-level scale; 0 if scales are not quantised.
    """

    format: str
    bits: int
    encoding: Encoding
    block: tuple[int, int]
    transposed: bool = False
    divide: bool = False
    nested_offset: float = 0.0
    nested_block: int = 0


@dataclass(frozen=True, slots=True)
class QuantisedTensor:
    """A tensor of the model that is stored in parts.

    Attributes:
        name: Its name in an ordinary checkpoint.
        dtype: The dtype that it would have in an ordinary checkpoint, by its safetensors name.
        shape: The shape that it would have in an ordinary checkpoint.
        matrix: Rows and columns of the codes of one matrix, before `Rule.transposed`. It is stored row by row.
        rule: How the values follow from the parts.
        parts: The stored tensors by role: codes, scale, and what else the format has.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    rule: Rule
    parts: Mapping[str, TensorInfo]

    @property
    def codes(self) -> TensorInfo:
        return self.parts["codes"]

    @property
    def size_bytes(self) -> int:
        """Size of all parts."""
        return sum(info.size_bytes for info in self.parts.values())


@dataclass(frozen=True, slots=True)
class QuantisedTensors:
    """What a quantised checkpoint holds beside its ordinary tensors.

    Attributes:
        tensors: The quantised tensors, by name.
        dropped: Stored tensors that a dense model does not have: scales of activations and of the KV cache.
    """

    tensors: Mapping[str, QuantisedTensor]
    dropped: frozenset[str]

    @property
    def part_names(self) -> frozenset[str]:
        """Every stored tensor that is a part of another one, or dropped."""
        return self.dropped | {info.name for tensor in self.tensors.values() for info in tensor.parts.values()}


ReadBytes = Callable[[str], bytes]


def find_quantised(
    quantisation: Quantisation, stored: Mapping[str, TensorInfo], dtype: str, read: ReadBytes
) -> QuantisedTensors:
    """Find every quantised tensor of a checkpoint.

    Args:
        quantisation: The configuration.
        stored: Every stored tensor, by name.
        dtype: That the tensors have when they are dequantised, by its safetensors name.
        read: Reads the bytes of a small stored tensor that holds a shape: bitsandbytes and a few packed integers need
            it.

    Raises:
        CheckpointError: A dtype without a rule; a part that is missing or has a wrong shape or dtype.
    """
    finder = _Finder(quantisation, stored, dtype, read)
    find = {
        "fp8": finder.fp8, "mxfp4": finder.mxfp4, "compressed-tensors": finder.compressed_tensors,
        "modelopt": finder.modelopt, "bitsandbytes": finder.bitsandbytes,
    }[quantisation.rules]  # fmt: skip
    for name, info in stored.items():
        if name not in finder.used:
            find(name, info)
    if not finder.found:
        raise CheckpointError(
            f"config.json says that the checkpoint is quantised ({quantisation.method}), but no tensor of it is",
            hint="remove quantization_config from config.json if the weights are not quantised",
        )
    return QuantisedTensors(finder.found, finder.dropped())


def refuse_without_rule(stored: Mapping[str, TensorInfo], used: frozenset[str], *, quantised: bool) -> None:
    """Raise CheckpointError for a stored tensor that must be quantised and that no rule reads.

    Args:
        stored: Every stored tensor.
        used: The names of those that a rule reads.
        quantised: Whether the configuration says that the checkpoint is quantised. Without that, integers are left to
            the checks of the model: some models have real tensors of integers.
    """
    unread = {name: info for name, info in stored.items() if name not in used}
    for name, info in unread.items():
        # (1, 1, n, n) is a causal mask, which GPT-2 checkpoints store as bytes.
        is_bytes = info.dtype in ("I8", "U8") and len(info.shape) > 1 and info.shape[:2] != (1, 1)
        if info.dtype.startswith("F8") or (quantised and is_bytes):
            why = "no rule reads it" if quantised else "config.json has no quantization_config for it"
            raise CheckpointError(f"{name} is stored as {info.dtype} {list(info.shape)}, and {why}", hint=UNQUANTISED)
    for name in unread if quantised else ():
        if name.endswith(_ORPHANS):
            raise CheckpointError(
                f"{name} is a part of a quantised weight, and no rule reads it: the weight is missing, or stored in "
                "another way",
                hint=UNQUANTISED,
            )


@dataclass
class _Finder:
    """Finds the quantised tensors of one checkpoint. A method for each format is called with every stored tensor."""

    quantisation: Quantisation
    stored: Mapping[str, TensorInfo]
    dtype: str
    read: ReadBytes
    found: dict[str, QuantisedTensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.quantisation.settings

    def dropped(self) -> frozenset[str]:
        """Scales of activations and of the KV cache."""
        modules = {name.removesuffix(".weight") for name in self.found}
        return frozenset(
            name
            for name, info in self.stored.items()
            if name.endswith(ACTIVATIONS)
            and name not in self.used
            and (math.prod(info.shape) <= 1 or any(name.removesuffix(end) in modules for end in ACTIVATIONS))
        )

    def add(
        self,
        name: str,
        shape: Sequence[int],
        matrix: tuple[int, int],
        rule: Rule,
        parts: Mapping[str, TensorInfo | None],
    ) -> None:
        """Record a tensor; a part that is None is not stored. Raises CheckpointError for a part of two tensors."""
        if len(shape) not in (2, 3) or 0 in shape:
            raise CheckpointError(
                f"{name} is quantised and has the shape {list(shape)}: rules read matrices, and fused experts",
                hint=UNQUANTISED,
            )
        present = {role: info for role, info in parts.items() if info is not None}
        if clash := next((p for p in present.values() if p.name in self.used), None):
            raise CheckpointError(f"{clash.name} is a part of two quantised weights, {name} is one", hint=UNQUANTISED)
        if name in self.found or (name in self.stored and name not in {p.name for p in present.values()}):
            raise CheckpointError(f"{name} is stored twice: quantised and unquantised", hint="remove one of the two")
        self.used |= {info.name for info in present.values()}
        self.found[name] = QuantisedTensor(name, self.dtype, tuple(shape), matrix, rule, present)

    def part(self, owner: str, *names: str, dtypes: Sequence[str]) -> TensorInfo:
        """The first of these tensors that is stored. Raises CheckpointError if none is, or for another dtype."""
        for name in names:
            if (info := self.stored.get(name)) is not None:
                if info.dtype not in dtypes:
                    raise CheckpointError(
                        f"{name} is {info.dtype}, and as a part of {owner} it should be {' or '.join(dtypes)}",
                        hint=UNQUANTISED,
                    )
                return info
        raise CheckpointError(
            f"{owner} is stored as {self.stored[owner].dtype}, but the checkpoint has no {names[0]}, which it needs",
            hint="fetch the model again: a file or a tensor is missing",
        )

    # FP8 of DeepSeek, Qwen, MiniMax, Mistral; FP4 experts of DeepSeek V4

    def fp8(self, name: str, info: TensorInfo) -> None:
        if info.dtype in _FP8:
            scale = self.part(name, *_scale_names(name), dtypes=(*FLOATS, *_EXPONENTS))
            block = _fitting_block(info, scale, self._fp8_blocks())
            mx = scale.dtype in _EXPONENTS and block == (1, 32)
            rule = Rule(f"{'MXFP8' if mx else 'FP8'}, {_block_words(block, info.shape)}", 8, "stored", block)
            self.add(name, info.shape, _matrix(info.shape), rule, {"codes": info, "scale": scale})
        elif info.dtype == "I8" and len(info.shape) > 1 and any(n in self.stored for n in _scale_names(name)):
            scale = self.part(name, *_scale_names(name), dtypes=_EXPONENTS)
            shape = (*info.shape[:-1], 2 * info.shape[-1])
            _require_grid(name, scale, shape, (1, 32))
            rule = Rule("FP4, groups of 32, scales in E8M0", 4, "e2m1", (1, 32))
            self.add(name, shape, _matrix(shape), rule, {"codes": info, "scale": scale})

    def _fp8_blocks(self) -> list[tuple[int, int]]:
        default = [1, 32] if self.quantisation.method == "mxfp8" else [128, 128]
        block = self.settings.get("weight_block_size", default)
        if block is None:
            return []
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise CheckpointError(
                f"weight_block_size is {str(block)[:80]}, expected two whole numbers", hint="correct config.json"
            )
        return [(block[0], block[1])]

    # MXFP4 of gpt-oss

    def mxfp4(self, name: str, info: TensorInfo) -> None:
        if not name.endswith("_blocks") or info.dtype != "U8":
            return
        logical = name.removesuffix("_blocks")
        scale = self.part(name, f"{logical}_scales", dtypes=("U8", "F8_E8M0"))
        if len(info.shape) != 4 or info.shape[3] != 16 or scale.shape != info.shape[:3]:
            raise CheckpointError(
                f"{name} is {list(info.shape)} and {scale.name} {list(scale.shape)}: expected [experts, out, in / 32, "
                "16] and the same without the last dimension",
                hint=UNQUANTISED,
            )
        experts, rows, groups, _ = info.shape
        rule = Rule("MXFP4, groups of 32", 4, "e2m1", (1, 32), transposed=True)
        self.add(logical, (experts, 32 * groups, rows), (rows, 32 * groups), rule, {"codes": info, "scale": scale})

    # compressed-tensors

    def compressed_tensors(self, name: str, info: TensorInfo) -> None:
        if name.endswith(".weight_packed"):
            if info.dtype == "I32":
                self._ct_integers(name, info)
            elif info.dtype == "U8":
                self._fp4(name, info, name.removesuffix("_packed"), divide=True, global_scale="_global_scale")
        elif name.endswith(".weight") and (info.dtype in _FP8 or info.dtype == "I8"):
            exponents = _EXPONENTS if info.dtype in _FP8 else ()
            scale = self.part(name, f"{name}_scale", dtypes=(*FLOATS, *exponents))
            zero_point = None
            if (zero_name := f"{name}_zero_point") in self.stored:
                zero_point = self.part(name, zero_name, dtypes=(*_INTEGERS, *_FP8, *FLOATS))
                if zero_point.shape != scale.shape:
                    raise _wrong_shape(zero_point, scale.shape, name)
            block = _fitting_block(info, scale, self._ct_blocks(info.shape))
            kind = "FP8" if info.dtype in _FP8 else "int8"
            rule = Rule(f"{kind}, {_block_words(block, info.shape)}", 8, "stored", block)
            parts = {"codes": info, "scale": scale, "zero_point": zero_point}
            self.add(name, info.shape, _matrix(info.shape), rule, parts)

    def _ct_groups(self) -> list[Mapping[str, Any]]:
        """The settings of weights in all config_groups."""
        groups = self.settings.get("config_groups")
        weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
        return [w for w in weights if isinstance(w, dict)]

    def _ct_blocks(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """The blocks that the configuration allows for a tensor of this shape."""
        m, n = shape[-2:]
        blocks = []
        for weights in self._ct_groups():
            structure, group = weights.get("block_structure"), weights.get("group_size")
            if isinstance(structure, list) and len(structure) == 2 and all(type(x) is int and x > 0 for x in structure):
                blocks.append((structure[0], structure[1]))
            elif type(group) is int and group > 0:
                blocks.append((1, group))
            elif weights.get("strategy") == "channel":
                blocks.append((1, n))
            elif weights.get("strategy") == "tensor":
                blocks.append((m, n))
        return list(dict.fromkeys(blocks))

    def _ct_integers(self, name: str, info: TensorInfo) -> None:
        base = name.removesuffix("_packed")
        scale = self.part(name, f"{base}_scale", dtypes=FLOATS)
        shape = self.part(name, f"{base}_shape", dtypes=("I64", "I32"))
        zero_point, order = self.stored.get(f"{base}_zero_point"), self.stored.get(f"{base}_g_idx")
        if len(info.shape) != 2 or len(scale.shape) != 2 or math.prod(shape.shape) != 2:
            raise _wrong_shape(shape if math.prod(shape.shape) != 2 else scale, (2,), name)
        bits, (m, n), block, symmetric = self._ct_packing(name, info, scale, shape)
        if symmetric is (zero_point is not None):
            has = "stores no zero point" if zero_point is None else f"stores {zero_point.name}"
            wanted = "symmetric" if symmetric else "asymmetric"
            raise CheckpointError(f"{name} is {wanted} by config.json, but the checkpoint {has}", hint=UNQUANTISED)
        if zero_point is not None:
            packed = (-(-m * bits // 32), scale.shape[1])
            if zero_point.dtype != "I32" or zero_point.shape != packed:
                raise _wrong_shape(zero_point, packed, name)
        if order is not None and (order.dtype not in ("I32", "I64") or order.shape != (n,)):
            raise _wrong_shape(order, (n,), name)
        words = f"int{bits}, {_block_words(block, (m, n))}" + (", asymmetric" if zero_point else "")
        rule = Rule(words + (", columns in another order" if order else ""), bits, "integer", block)
        parts = {"codes": info, "scale": scale, "zero_point": zero_point, "order": order, "shape": shape}
        self.add(base, (m, n), (m, n), rule, parts)

    def _ct_packing(
        self, name: str, info: TensorInfo, scale: TensorInfo, shape: TensorInfo
    ) -> tuple[int, tuple[int, int], tuple[int, int], bool]:
        """Bits, shape, block and symmetry of a packed weight: those of the config group that fits its parts."""
        m, words = info.shape
        for weights in self._ct_groups():
            bits, group = weights.get("num_bits"), weights.get("group_size")
            if not (type(bits) is int and 2 <= bits <= 8 and weights.get("type", "int") == "int"):
                continue
            if type(group) is int and group > 0:
                n, block = scale.shape[1] * group, (1, group)  # compared with weight_shape when the codes are read
            else:
                m_read, n = _little_endian(self.read(shape.name), SAFETENSORS_DTYPES[shape.dtype].itemsize)
                block = (m, n) if weights.get("strategy") == "tensor" else (1, n)
                if m_read != m or not 0 < n < 2**40:
                    raise CheckpointError(f"{shape.name} says {[m_read, n]}, and {name} has {m} rows", hint=UNQUANTISED)
            if -(-n * bits // 32) == words and _is_grid(scale.shape, (m, n), block):
                return bits, (m, n), block, bool(weights.get("symmetric", True))
        raise CheckpointError(
            f"{name} is {list(info.shape)} and {scale.name} {list(scale.shape)}: no config group fits them",
            hint=UNQUANTISED,
        )

    def _fp4(self, name: str, info: TensorInfo, logical: str, *, divide: bool, global_scale: str) -> None:
        """MXFP4 and NVFP4 of compressed-tensors, NVFP4 of ModelOpt: the dtype of the scale tells them apart."""
        scale = self.part(name, f"{logical}_scale", dtypes=("F8_E4M3", *_EXPONENTS))
        shape = (*info.shape[:-1], *(2 * n for n in info.shape[-1:]))
        nv = scale.dtype == "F8_E4M3"
        block = (1, 16 if nv else 32)
        _require_grid(name, scale, shape, block)
        whole = self.part(name, f"{logical}{global_scale}", dtypes=("F32",)) if nv else None
        if whole is not None and math.prod(whole.shape) != 1:
            raise _wrong_shape(whole, (1,), name)
        rule = Rule("NVFP4, groups of 16" if nv else "MXFP4, groups of 32", 4, "e2m1", block, divide=divide)
        self.add(logical, shape, _matrix(shape), rule, {"codes": info, "scale": scale, "global_scale": whole})

    # ModelOpt

    def modelopt(self, name: str, info: TensorInfo) -> None:
        if not name.endswith(".weight"):
            return
        if info.dtype in _FP8:
            scale = self.part(name, f"{name}_scale", dtypes=FLOATS)
            block = _fitting_block(info, scale, [])
            rule = Rule("FP8, one scale for the tensor", 8, "stored", block)
            self.add(name, info.shape, _matrix(info.shape), rule, {"codes": info, "scale": scale})
        elif info.dtype == "U8" and len(info.shape) > 1:
            self._fp4(name, info, name, divide=False, global_scale="_scale_2")

    # bitsandbytes

    def bitsandbytes(self, name: str, info: TensorInfo) -> None:
        states = (f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
        state_name = next((state for state in states if state in self.stored), "")
        if not state_name:
            return
        if info.dtype != "U8":
            raise CheckpointError(
                f"{name} is stored as {info.dtype}: 4-bit codes in {info.dtype} (bnb_4bit_quant_storage) have no rule",
                hint=UNQUANTISED,
            )
        shape, block, nested_block, offset = self._bnb_state(state_name)
        entries = math.prod(shape)
        kind = "NF4" if state_name.endswith("nf4") else "FP4"
        absmax = self.part(name, f"{name}.absmax", dtypes=("U8",) if nested_block else ("F32",))
        table = self.part(name, f"{name}.quant_map", dtypes=("F32",))
        for part, expected in ((info, (-(-entries // 2), 1)), (absmax, (-(-entries // block),)), (table, (16,))):
            if math.prod(part.shape) != math.prod(expected):
                raise _wrong_shape(part, expected, name)
        nested: dict[str, TensorInfo] = {}
        if nested_block:
            nested["nested_absmax"] = self.part(name, f"{name}.nested_absmax", dtypes=("F32",))
            nested["nested_map"] = self.part(name, f"{name}.nested_quant_map", dtypes=("F32",))
            sizes = (math.ceil(math.prod(absmax.shape) / nested_block),), (256,)
            for part, expected_size in zip(nested.values(), sizes, strict=True):
                if part.shape != expected_size:
                    raise _wrong_shape(part, expected_size, name)
        words = f"bitsandbytes {kind}, groups of {block}" + (", scales quantised again" if nested_block else "")
        rule = Rule(words, 4, "map", (1, block), nested_offset=offset, nested_block=nested_block)
        matrix = (entries // block, block) if entries % block == 0 else (1, entries)
        parts = {"codes": info, "scale": absmax, "map": table, "state": self.stored[state_name], **nested}
        self.add(name, shape, matrix, rule, parts)

    def _bnb_state(self, name: str) -> tuple[tuple[int, int], int, int, float]:
        """Shape, block, nested block (0 without) and nested offset from the JSON text that bitsandbytes stores."""
        try:
            state = json.loads(self.read(name).decode())
            m, n = state["shape"]
            block, nested = state["blocksize"], state.get("nested_blocksize", 0) or 0
            offset = float(state.get("nested_offset", 0.0) or 0.0)
            ok = all(type(x) is int and 0 < x < 2**31 for x in (m, n, block)) and type(nested) is int and nested >= 0
            if not ok or block % 2:
                raise ValueError("impossible numbers")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{name} cannot be read: {str(error)[:200]}", hint=UNQUANTISED) from error
        return (m, n), block, nested, offset


def _scale_names(name: str) -> Iterator[str]:
    """The names that a scale of an FP8 tensor may have."""
    yield f"{name}_scale_inv"
    if name.endswith(".weight"):
        module = name.removesuffix(".weight")
        yield from (f"{module}.scale", f"{module}.qscale_weight", f"{module}.weight_scale")


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of one matrix of a tensor; a vector is one row."""
    return (shape[-2], shape[-1]) if len(shape) > 1 else (1, shape[0] if shape else 1)


def _is_grid(scale: Sequence[int], shape: Sequence[int], block: tuple[int, int]) -> bool:
    """Whether a scale of this shape has one entry for each block, the last ones cut short."""
    m, n = _matrix(shape)
    grid = (*shape[:-2], -(-m // block[0]), -(-n // block[1]))
    return tuple(scale) == grid or (tuple(scale) == grid[:-1] and grid[-1] == 1)


def _require_grid(name: str, scale: TensorInfo, shape: Sequence[int], block: tuple[int, int]) -> None:
    if not _is_grid(scale.shape, shape, block):
        m, n = _matrix(shape)
        raise _wrong_shape(scale, (*shape[:-2], -(-m // block[0]), -(-n // block[1])), name)


def _fitting_block(info: TensorInfo, scale: TensorInfo, blocks: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The block of a tensor: the one that fits the shape of the scale, else the whole matrix if it has one scale.

    Raises:
        CheckpointError: No block fits.
    """
    m, n = _matrix(info.shape)
    for block in blocks:
        if _is_grid(scale.shape, info.shape, block):
            return block
    leading = info.shape[:-2]
    if math.prod(scale.shape) == 1 or (leading and tuple(scale.shape) in (leading, (*leading, 1, 1))):
        return m, n
    if blocks:
        m_block, n_block = blocks[0]
        raise _wrong_shape(scale, (*leading, -(-m // m_block), -(-n // n_block)), info.name)
    raise _wrong_shape(scale, (1,), info.name)


def _block_words(block: tuple[int, int], shape: Sequence[int]) -> str:
    m, n = _matrix(shape)
    if block == (m, n):
        return "one scale for the tensor"
    if block == (1, n):
        return "one scale for each row"
    return f"groups of {block[1]}" if block[0] == 1 else f"blocks of {block[0]} x {block[1]}"


def _wrong_shape(part: TensorInfo, expected: Sequence[int], owner: str) -> CheckpointError:
    return CheckpointError(
        f"{part.name} is {part.dtype} {list(part.shape)}, and for {owner} it should have the shape {list(expected)}",
        hint="fetch the model again, or compare weight_block_size and config_groups in config.json with its source",
    )


def _little_endian(data: bytes, itemsize: int) -> tuple[int, ...]:
    return tuple(
        int.from_bytes(data[at : at + itemsize], "little", signed=True) for at in range(0, len(data), itemsize)
    )
