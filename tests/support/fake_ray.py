"""A stand-in for Ray: it runs each task at once, in this process, but with `/` as the current folder.

So an output folder below /proc/self/cwd is one that its nodes do not see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import fork_server


class FakeRay:
    """The part of the module `ray` that `ray_makers` uses, for a cluster of nodes with these resources.

    Attributes:
        asked: What was asked of Ray for each task, with the task's function as `function`.
    """

    class exceptions:  # noqa: N801
        class RayError(Exception): ...

        class RayTaskError(RayError):
            def __init__(self, cause: Exception) -> None:
                super().__init__(str(cause))
                self.cause = cause

    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
    )

    def __init__(self, *resources: Mapping[str, float]) -> None:
        self._nodes: list[dict[str, Any]] = [
            {"NodeID": number, "NodeManagerHostname": f"node-{number}", "Alive": True, "Resources": each}
            for number, each in enumerate(resources)
        ]
        self.asked: list[dict[str, Any]] = []

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def cluster_resources(self) -> dict[str, float]:
        names = {name for node in self._nodes for name in node["Resources"]}
        return {name: sum(node["Resources"].get(name, 0) for node in self._nodes) for name in names}

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(**asked: Any) -> Any:
            self.asked.append({"function": function, **asked})
            return SimpleNamespace(remote=lambda *arguments: _Reference(function, arguments))

        return SimpleNamespace(options=options)

    def wait(self, references: list[_Reference], num_returns: int, **_: Any) -> tuple[list[_Reference], Any]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: _Reference) -> Any:
        if reference.error:
            raise self.exceptions.RayTaskError(reference.error)
        return reference.result

    def cancel(self, *_: Any, **__: Any) -> None: ...

    def shutdown(self) -> None: ...


class _Reference:
    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.result, self.error = None, None
        here = Path.cwd()
        os.chdir("/")
        try:
            self.result = function(*arguments)
        except Exception as error:
            self.error = error
        finally:
            os.chdir(here)


def command_line(*arguments: str) -> None:
    """Do what the command `milora-init` does, with this Ray for --ray."""
    from milora_init.run import ray_makers

    pytest.MonkeyPatch().setattr(ray_makers, "connect", lambda _: FakeRay({"CPU": 2.0}, {"CPU": 0.0}))
    fork_server.command_line(*arguments)
