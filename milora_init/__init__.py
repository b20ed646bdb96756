"""milora-init: initialise LoRA adapters from singular components of a model's weights (MiLoRA, PiSSA), streamed.

    import milora_init
    result = milora_init.initialize("./my-model", "./svd_init", rank=64)
    print(result.load)  # Python that loads the pair

`initialize`, `scan`, `verify`, `merge`, `convert` and `push` do what the commands of the same names do, and
`initialize_part` does what `init --part` does. Every error is a `MiloraError`. Nothing heavy is imported until a name
is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from milora_init.api import convert, initialize, initialize_part, merge, push, scan, verify
    from milora_init.errors import (
        CheckpointError,
        HubError,
        MiloraError,
        OutputError,
        PlanError,
        SolveError,
        UsageError,
    )
    from milora_init.hub.upload import Published
    from milora_init.manifest import Manifest
    from milora_init.options import InitOptions
    from milora_init.records import ConvertResult, MergeResult
    from milora_init.result import InitResult, PartResult
    from milora_init.run.progress import Progress
    from milora_init.spectra import ScanResult
    from milora_init.verification.verdict import Verdict

_MODULE_OF = {
    "initialize": "api", "initialize_part": "api", "PartResult": "result", "scan": "api", "ScanResult": "spectra",
    "verify": "api", "merge": "api", "convert": "api", "push": "api",
    "InitOptions": "options", "InitResult": "result", "Verdict": "verification.verdict", "MergeResult": "records",
    "ConvertResult": "records", "Published": "hub.upload", "Manifest": "manifest", "Progress": "run.progress",
    "MiloraError": "errors", "UsageError": "errors", "CheckpointError": "errors", "PlanError": "errors",
    "OutputError": "errors", "SolveError": "errors", "HubError": "errors",
}  # fmt: skip
__all__ = [
    "CheckpointError",
    "ConvertResult",
    "HubError",
    "InitOptions",
    "InitResult",
    "Manifest",
    "MergeResult",
    "MiloraError",
    "OutputError",
    "PartResult",
    "PlanError",
    "Progress",
    "Published",
    "ScanResult",
    "SolveError",
    "UsageError",
    "Verdict",
    "__version__",
    "convert",
    "initialize",
    "initialize_part",
    "merge",
    "push",
    "scan",
    "verify",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # `verify` is a folder of the package too: its import must not hide the function
    return value


def __dir__() -> list[str]:
    return __all__
