"""Interface of the durable store of a site for the protocol: three facts, no secret.

The protocol core does no I/O; the client keeps these facts on the site's own disk. Every method
returns only after its write is durable, and is atomic against other processes of the site.
"""

from __future__ import annotations

from typing import Protocol


class RoundStore(Protocol):
    """Durable memory of a site. The first write wins; nothing is ever changed or removed.

    A store restored from an old copy would forget what it answered, so it belongs in the file
    whose rollback the site detects at its start (the ledger's).
    """

    def claim_epoch(self, kid: bytes) -> bool:
        """Record a key epoch id (32 bytes). True where it was new, False where it was known."""
        ...

    def open_round(self, study: bytes, round_number: int, constants: bytes) -> bytes:
        """Record the constants of a round before its first masked vector leaves.

        Args:
            study: hash of the study, 32 bytes.
            round_number: number of the round.
            constants: hash over whom it invites, t, length, scale, clip and weights; 32 bytes.

        Returns:
            What stands in the store for (study, round): these, or those of the first time.
        """
        ...

    def committed(self, study: bytes, round_number: int) -> tuple[str, ...] | None:
        """The U3 that the site answered for in (study, round), or ``None``."""
        ...

    def commit(self, study: bytes, round_number: int, u3: tuple[str, ...]) -> tuple[str, ...]:
        """Record the U3 that the site is about to answer for, before its stage-4 reply leaves.

        Returns the U3 that stands in the store for (study, round): this, or that of the first
        time. The site answers only where both are the same.
        """
        ...
