"""milora-init: initialise MiLoRA and its kin from a checkpoint, streamed.

    from milora_init import InitOptions, initialize
    manifest = initialize(InitOptions(model="./my-model", out="./svd_init", rank=64))

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["InitOptions", "Manifest", "MiloraError", "__version__", "initialize"]

if TYPE_CHECKING:
    from milora_init.errors import MiloraError
    from milora_init.manifest import Manifest
    from milora_init.options import InitOptions
    from milora_init.run.initialize import initialize


def __getattr__(name: str) -> Any:
    from importlib import import_module

    homes = {"initialize": "run.initialize", "InitOptions": "options", "MiloraError": "errors", "Manifest": "manifest"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
