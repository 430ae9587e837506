"""Versions of Cloister and of its protocol."""

__version__ = "0.1.0"
PROTOCOL = 6
"""Version of the protocol between site and coordinator; it rises with each incompatible change."""
