"""The position of one expert's matrix in a fused parameter of a mixture-of-experts layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertSlot:
    """The place of a matrix in a parameter that holds one for every expert.

    Attributes:
        parameter: Its full name.
        index, count: Which expert's it is, of how many.
        part, parts: Which of the matrices that are stacked along m: 0 and 1 of 2 are gate and up.
    """

    parameter: str
    index: int
    count: int
    part: int
    parts: int

    @property
    def suffix(self) -> str:
        """What a person would name: `experts.down_proj`."""
        return ".".join(self.parameter.split(".")[-2:])
