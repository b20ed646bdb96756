"""The whole job on simulated GPUs: two share the work, and a failure of memory or of a library has a clear end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import simulated_cuda
from support.marks import wide
from support.runs import initialize
from support.tiny_models import TARGETS, contents

from milora_init.errors import SolveError
from milora_init.manifest import MANIFEST, Manifest
from milora_init.options import InitOptions
from milora_init.verification.verify import verify

NAMES = ("q_proj", "k_proj", "up_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are solved in mixed precision, and one that is too small for it."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="2MB")
    return folder


@pytest.fixture
def on_gpus(start: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """on_gpus(model, devices, fault=None, may_pin=True, **options): manifest, files but for it, and the machine."""

    def run(model: Path, devices: int, *, fault: Any = None, may_pin: bool = True, **options: Any) -> Any:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        with simulated_cuda.machine(devices, monkeypatch) as machine:
            machine.fault, machine.may_pin = fault, may_pin
            given = {"target": NAMES, "rank": 8, **options}
            manifest = start(model, out="out", device=("cuda",), **given)
        return manifest, files(Path("out")), machine

    return run


def files(out: Path) -> dict[str, bytes]:
    """All files but for the manifest, which holds seconds."""
    return {name: content for name, content in contents(out).items() if name != MANIFEST}


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and the files of a run on one GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))  # the adapter's config names the folder `out`
        with simulated_cuda.machine(1, patch):
            made = initialize(InitOptions(model=str(model), out="out", target=NAMES, rank=8, device=("cuda",)))
        return made, files(Path("out"))


def test_any_number_of_devices_makes_the_same_bytes_and_a_pair(
    model: Path, alone: Any, on_gpus: Callable[..., Any]
) -> None:
    made_alone, bytes_alone = alone
    together, bytes_together, machine = on_gpus(model, 2)
    _, bytes_again, _ = on_gpus(model, 2)
    assert bytes_alone == bytes_together == bytes_again
    assert {record.device for record in made_alone.weights} == {"cuda:0"}
    assert {record.device for record in together.weights} == {"cuda:0", "cuda:1"}
    assert Counter(record.certificate.path for record in together.weights) == {"mixed": 4, "eigh": 2}
    assert verify("out", model=str(model), all_components=True).ok

    # Each thread has a stream of its own on its device; weights and residuals go through page-locked memory.
    assert {str(device) for device, _ in machine.streams.values()} == {"cuda:0", "cuda:1"}
    assert len({id(stream) for _, stream in machine.streams.values()}) == len(machine.streams)
    assert all(stream.device == device for device, stream in machine.streams.values())
    entries = sum(r.shape[0] * r.shape[1] for r in together.weights)
    factors = sum(8 * sum(r.shape) for r in together.weights)
    assert machine.pinned == 2 * entries + factors


@pytest.mark.wide
def test_equal_weights_of_a_file_are_solved_in_batches(
    model: Path, on_gpus: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of two, alone without memory for a batch; and the batches are those of the file on any devices."""
    source = tmp_path / "one-file"
    transformers.LlamaForCausalLM.from_pretrained(model).save_pretrained(source)
    manifest, made, _ = on_gpus(source, 1)
    together = [r for r in manifest.weights if "2 equal weights at once" in r.certificate.reason]
    assert {r.module.rpartition(".")[2] for r in together} == {"q_proj", "up_proj"}
    assert len(together) == 4
    assert verify("out", model=str(source), all_components=True).ok
    assert made == on_gpus(source, 2)[1]

    alone, _, machine = on_gpus(source, 1, fault=Failing("amin", MEMORY[0], times=4))
    assert machine.caches_emptied == 4
    assert not [r for r in alone.weights if "at once" in r.certificate.reason]
    assert {r.device for r in alone.weights} == {"cuda:0"}


def test_transposed_weights(checkpoint: Callable[..., Path], on_gpus: Callable[..., Any]) -> None:
    source = checkpoint("gpt2", "bfloat16")
    manifest, made, _ = on_gpus(source, 2, target=TARGETS["gpt2"])
    assert all(record.device.startswith("cuda") for record in manifest.weights)
    assert made == on_gpus(source, 1, target=TARGETS["gpt2"])[1]
    assert verify("out", model=str(source), all_components=True).ok


class Failing:
    """A fault: the calls of one name on one device raise, so many of them."""

    def __init__(self, name: str, error: RuntimeError, *, device: str = "cuda:0", times: int = 1) -> None:
        self.name, self.error, self.device, self.left = name, error, device, times

    def __call__(self, name: str, device: torch.device) -> None:
        if name == self.name and str(device) == self.device and self.left:
            self.left -= 1
            raise self.error


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
]


@pytest.mark.parametrize("error", [MEMORY[0], *map(wide, MEMORY[1:])], ids=["torch", "cusolver", "cuda"])
def test_a_device_out_of_memory_is_tried_again(
    error: RuntimeError, model: Path, alone: Any, on_gpus: Callable[..., Any]
) -> None:
    fault = Failing("linalg_cholesky_ex", error)
    manifest, made, machine = on_gpus(model, 2, fault=fault)
    assert fault.left == 0
    assert machine.caches_emptied == 1
    assert {record.device for record in manifest.weights} == {"cuda:0", "cuda:1"}
    assert made == alone[1]


def test_a_weight_that_does_not_fit_a_device_is_solved_on_the_cpu(model: Path, on_gpus: Callable[..., Any]) -> None:
    fault = Failing("linalg_cholesky_ex", MEMORY[0], device="cuda:1", times=10**6)
    manifest, _, _ = on_gpus(model, 2, fault=fault)
    moved = [record for record in manifest.weights if record.device.startswith("cpu")]
    assert moved
    assert {record.device for record in moved} == {"cpu, because cuda:1 ran out of memory"}
    assert "mixed" not in {record.certificate.path for record in moved}
    assert verify("out", model=str(model), all_components=True).ok


def test_an_upload_without_memory_waits_for_the_lock(model: Path, alone: Any, on_gpus: Callable[..., Any]) -> None:
    _, made, machine = on_gpus(model, 1, fault=Failing("to", MEMORY[0]))
    assert machine.caches_emptied == 0
    assert made == alone[1]


def test_without_page_locked_memory_the_bytes_are_the_same(
    model: Path, alone: Any, on_gpus: Callable[..., Any]
) -> None:
    _, made, machine = on_gpus(model, 1, may_pin=False)
    assert machine.pinned == 0
    assert made == alone[1]


LIBRARIES = [
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXpotrf( handle, params)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasDgemm( handle, opa)`"),
]


@pytest.mark.parametrize("error", [LIBRARIES[0], wide(LIBRARIES[1])], ids=["cusolver", "cublas"])
def test_a_failure_of_a_library_is_the_next_algorithm(
    error: RuntimeError, model: Path, on_gpus: Callable[..., Any]
) -> None:
    manifest, _, _ = on_gpus(model, 1, fault=Failing("linalg_cholesky_ex", error), target=("q_proj",))
    (fallen,) = [record for record in manifest.weights if record.certificate.path == "lanczos"]
    assert fallen.certificate.reason.startswith(str(error).partition("\n")[0])
    assert verify("out", model=str(model), all_components=True).ok


def test_a_device_that_fails_altogether_is_an_error_that_names_it(model: Path, on_gpus: Callable[..., Any]) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`")
    with pytest.raises(SolveError) as caught:
        on_gpus(model, 1, fault=Failing("linalg_cholesky_ex", error, times=10**6), target=("q_proj",))
    assert caught.value.message.endswith("cuda:0 failed: CUDA error: an illegal memory access was encountered")
    assert "--device cpu" in caught.value.hint
