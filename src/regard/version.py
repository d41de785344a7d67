"""The version of this package, which packaging, reports and exports read."""

__version__ = "0.1.0"
