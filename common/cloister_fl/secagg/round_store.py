"""Interface of the durable store of a site for the protocol: three facts, no secret.

The protocol core does no I/O; the client keeps these facts on the site's own disk. Every method
returns only after its write is durable, and is atomic against other processes of the site.
"""

from __future__ import annotations

from typing import Protocol

from cloister_fl.secagg.session import Session


class RoundStore(Protocol):
    """Durable memory of a site. The first write wins; nothing is ever changed or removed.

    A store restored from an old copy would forget what it answered, so it belongs in the file
    whose rollback the site detects at its start (the ledger's).
    """

    def claim_epoch(self, kid: bytes) -> bool:
        """Record a key epoch id (32 bytes). True where it was new, False where it was known."""
        ...

    def open_round(self, session: Session, constants: bytes) -> bytes:
        """Record the constants of a sum before its first masked vector leaves.

        Args:
            session: the sum. Which other sums count as the same is the store's to say: those of
                the same study and round, and where vectors are not noised anew, those over the
                same model.
            constants: hash over whom it invites, t, length, scale, clip and weights; 32 bytes.

        Returns:
            What stands in the store for the sum: these, or those of the first time.
        """
        ...

    def committed(self, session: Session) -> tuple[str, ...] | None:
        """The U3 that the site answered for in this sum, or ``None``."""
        ...

    def commit(self, session: Session, u3: tuple[str, ...]) -> tuple[str, ...]:
        """Record the U3 that the site is about to answer for, before its stage-4 reply leaves.

        Returns the U3 that stands in the store for the sum: this, or that of the first time. The
        site answers only where both are the same.
        """
        ...
