"""Dates of a certificate: how long it still holds, and from when its end is told."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass

from cryptography import x509

RENEW_DAYS = 60
"""Days before its end from which a certificate is renewed, and its end is told."""
AUTHORITY_DAYS = 730
"""Days before the end of an authority from which it is told: what it certifies ends with it."""
DAY_S = 86400.0


@dataclass(frozen=True)
class Validity:
    """From when to when a certificate holds, both in UTC."""

    begins: datetime.datetime
    ends: datetime.datetime

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Validity:
        """The dates of a certificate."""
        return cls(certificate.not_valid_before_utc, certificate.not_valid_after_utc)

    @property
    def until(self) -> str:
        """The day on which it ends, such as ``2028-11-30``."""
        return f"{self.ends:%Y-%m-%d}"

    def days_left(self, now: float | None = None) -> float:
        """Days until its end, negative once it has passed; ``now`` is Unix time in seconds."""
        moment = time.time() if now is None else now
        return (self.ends.timestamp() - moment) / DAY_S

    def is_early(self, now: float | None = None) -> bool:
        """Whether it does not hold yet."""
        return self.begins.timestamp() > (time.time() if now is None else now)

    def told(self, now: float | None = None) -> str:
        """Its end in words that follow the certificate's name."""
        days = self.days_left(now)
        if days <= 0:
            return f"expired on {self.until}"
        whole = int(days)
        return f"ends on {self.until}, in {whole} {'day' if whole == 1 else 'days'}"
