"""The one exception by which a step turns a file away."""

from __future__ import annotations

from cloister_common.errors import Reject


class RejectedFile(Exception):
    """A file ends here; carries the reason and nothing of the file."""

    def __init__(self, reason: Reject) -> None:
        super().__init__(reason.value)
        self.reason = reason
