"""The exceptions by which a step turns a file away, or all files of a coding."""

from __future__ import annotations

from cloister_common.errors import DecoderUnfit, Reject


class RejectedFile(Exception):
    """A file ends here; carries the reason and nothing of the file."""

    def __init__(self, reason: Reject) -> None:
        super().__init__(reason.value)
        self.reason = reason


def unfit(transfer_syntax: str) -> DecoderUnfit:
    """The error of a decoder that fails its known-answer test."""
    return DecoderUnfit(
        f"The decoder of transfer syntax {transfer_syntax} fails its known-answer test.",
        why="What is installed differs from what Cloister was tested with.",
        remedy="Install Cloister's pinned versions: pip install -c constraints.txt "
        "'cloister[client]'.",
    )
