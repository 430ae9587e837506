"""What the coordinating site and the hospitals must agree on."""

__version__ = "0.1.0"
