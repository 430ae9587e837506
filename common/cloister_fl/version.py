"""What the coordinating site and the hospitals must agree on."""

__version__ = "0.1.0"
PROTOCOL = 4
"""Number of what site and coordinator say to each other; it changes where they would not agree."""
