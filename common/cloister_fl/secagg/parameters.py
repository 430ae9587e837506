"""Parameters of secure aggregation: numbers of sites, shares and survivors, never negotiated.

Every site derives these numbers itself from the number of invited sites and the number of
colluders that it allows for, and refuses a request that claims others. The server chooses none.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloister_fl.errors import ParameterRefused
from cloister_fl.membership.roster import MAX_SITES

VERSION = "secagg/v2"
"""Name and version of the protocol; it enters every hash."""

DEFAULT_COLLUDERS = 1
DEFAULT_MINIMUM_SITES = 5


@dataclass(frozen=True)
class Parameters:
    """The numbers of one key epoch; build them with ``Parameters.derive``.

    Attributes:
        n: invited sites, fixed before stage 0.
        t: shares that rebuild a secret, and signatures that a site wants at stage 4.
        m: least size of U2 and U3.
        c: sites that may collude with the server.
    """

    n: int
    t: int
    m: int
    c: int

    @classmethod
    def derive(cls, n: int, c: int = DEFAULT_COLLUDERS) -> Parameters:
        """Derive t and m from n and c.

        ``t = max(floor(2n/3) + 1, ceil((n + c + 1) / 2))``, so that 2t > n + c: two sets of t
        sites share one that is honest, and a site answers for one set only (Bonawitz et al.
        2017, section 6.2). ``m = max(t, c + 3)``: a sum over U3 still mixes two honest sites
        after the colluders take theirs away, and one more may have failed to answer.

        Raises:
            ParameterRefused: n is 2 or less, above 1000, or too small for c.
        """
        if n <= 2:
            raise ParameterRefused(
                f"Secure aggregation among {n} sites is refused.",
                why="From the sum of two, each learns the update of the other.",
                remedy="Invite more sites; five are the default minimum. Or train without secure "
                "aggregation, with local differential privacy alone: aggregation.secure = false.",
            )
        if n > MAX_SITES or c < 0:
            raise ParameterRefused(
                f"{n} sites with {c} colluding are out of range.",
                remedy=f"Invite at most {MAX_SITES} sites; aggregation.colluders is 0 or more.",
            )
        t = max(2 * n // 3 + 1, (n + c + 2) // 2)
        m = max(t, c + 3)
        if max(t, m) > n:
            raise ParameterRefused(
                f"{n} sites cannot tolerate {c} colluding with the server.",
                why=f"A sum would need {m} sites.",
                remedy="Invite more sites; or, where no hospital would work with the coordinator, "
                "say so: aggregation.colluders = 0 in the study and policy.colluders = 0 at each "
                "site. Or train without secure aggregation, with local differential privacy alone: "
                "aggregation.secure = false.",
            )
        return cls(n, t, m, c)

    @property
    def accusers(self) -> int:
        """To how many sites that complain of its boxes a dealer publishes the shares it dealt them.

        As many as may lie, and one where none is expected to: else the word of a single site would
        shut out whom it accuses. That one's share helps nobody: with c = 0, two sets of ``t``
        answers share an honest site even then, for ``2 t > n + 1``.
        """
        return max(self.c, 1)

    @property
    def dropouts(self) -> int:
        """How many of n sites may fail in a round without ending it."""
        return self.n - self.m

    @property
    def cautions(self) -> tuple[str, ...]:
        """Warnings to show before such a federation starts; empty from n = 5."""
        told = []
        if self.c == 0:
            told.append(
                "No site may collude with the coordinator: one that does learns the sum of the "
                "others."
            )
        if self.dropouts == 0:
            told.append("No site may drop out: every round needs all of them.")
        return tuple(told)
