"""Colours of pages and plots, and the mark by which a file of ours is known."""

from __future__ import annotations

GENERATOR = "milora-init"

# Twelve steps of viridis (matplotlib, CC0), dark to light: they keep their order in grey and for the colour-blind.
PALETTE = (
    "#440154", "#482173", "#433e85", "#38588c", "#2d708e", "#25858e",
    "#1e9b8a", "#2ab07f", "#52c569", "#86d549", "#c2df23", "#fde725",
)  # fmt: skip
