"""Rejections: the exceptions that reject a file, or all files of a transfer syntax."""

from __future__ import annotations

from cloister_fl.errors import DecoderUnfit, Reject


class RejectedFile(Exception):
    """A file ends here; carries the reason and nothing of the file."""

    def __init__(self, reason: Reject) -> None:
        super().__init__(reason.value)
        self.reason = reason


SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
"""SOP class of a DICOM Segmentation."""


def unfit(uid: str) -> DecoderUnfit:
    """The error of a reader that fails its known-answer test.

    Args:
        uid: of a transfer syntax, or ``SEGMENTATION``.
    """
    # Late, for the workers load this module, and no more than they need.
    from cloister_fl.system.installation import install_command

    what = "DICOM Segmentations" if uid == SEGMENTATION else f"transfer syntax {uid}"
    return DecoderUnfit(
        f"The decoder of {what} fails its known-answer test.",
        why="The installed versions differ from those that Cloister was tested with.",
        remedy=f"Install the pinned versions: {install_command('client')}",
    )
