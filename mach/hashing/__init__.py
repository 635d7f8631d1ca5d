"""Labels to buckets and back: universal families, the table of an ensemble, and the sizes that theory asks for."""

from mach.hashing.table import LabelTable

__all__ = ["LabelTable"]
