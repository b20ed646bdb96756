"""Describe the position of one expert's matrix in a fused parameter.

transformers stores the matrices of all experts of a layer in one parameter. PEFT adapts that parameter as a whole, so
this position is needed to find the factors of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertSlot:
    """The position of one matrix in a fused parameter.

    Attributes:
        parameter: The full name of the parameter.
        index, count: The index of the expert, and the number of experts.
        part, parts: The index of the matrix among those that one expert has stacked along m, and their number. For
            gate_up_proj, part 0 of 2 is gate and part 1 is up.
    """

    parameter: str
    index: int
    count: int
    part: int
    parts: int

    @property
    def suffix(self) -> str:
        """The last two parts of the parameter's name, such as `experts.down_proj`."""
        return ".".join(self.parameter.split(".")[-2:])
