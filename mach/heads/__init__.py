"""Heads: hidden vectors -> B outputs, R repetitions packed. The full head is the same head with B = K and R = 1."""

from mach.heads.linear import LinearHead, Update
from mach.heads.positives import Positives
from mach.heads.rules import Rule, Ruled, rule_of

__all__ = ["LinearHead", "Positives", "Rule", "Ruled", "Update", "rule_of"]
