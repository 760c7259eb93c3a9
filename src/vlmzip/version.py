"""The version of vlmzip; it is written nowhere else."""

__version__ = "0.1.0"
