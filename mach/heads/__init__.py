"""Heads: hidden vectors -> B outputs, R repetitions packed. The full head is the same head with B = K and R = 1."""

from mach.heads.linear import LinearHead, Positives, Update

__all__ = ["LinearHead", "Positives", "Update"]
