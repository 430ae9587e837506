"""The server's book of complaints in one key epoch: who accuses whom, and who has answered."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloister_fl.secagg.messages.codec import Complaint, Disclosure, DisclosureRequest


@dataclass
class Complaints:
    """Complaints and answers that were checked; all lists are by rising site id.

    Attributes:
        made: by accuser.
        answers: by dealer.
    """

    made: dict[str, Complaint] = field(default_factory=dict)
    answers: dict[str, Disclosure] = field(default_factory=dict)

    def accusers_of(self, dealer: str) -> tuple[str, ...]:
        """Who complains of a dealer."""
        return tuple(sorted(site for site, one in self.made.items() if dealer in one.dealers))

    @property
    def unanswered(self) -> tuple[str, ...]:
        """Dealers that somebody complains of, and that have not published its shares."""
        named = {dealer for complaint in self.made.values() for dealer in complaint.dealers}
        return tuple(sorted(named - self.answers.keys()))

    def accused_by_more_than(self, most: int) -> tuple[str, ...]:
        """Dealers that more sites complain of, and that have not published its shares."""
        return tuple(name for name in self.unanswered if len(self.accusers_of(name)) > most)

    @property
    def settled(self) -> tuple[str, ...]:
        """Accusers that have nothing unanswered."""
        open_ = set(self.unanswered)
        return tuple(
            sorted(site for site, one in self.made.items() if not open_ & set(one.dealers))
        )

    def requests(self, kid: bytes, most: int) -> dict[str, DisclosureRequest]:
        """The request to each dealer that has not answered, of ``most`` accusers at most."""
        return {
            dealer: DisclosureRequest(
                kid, tuple(self.made[site] for site in self.accusers_of(dealer))
            )
            for dealer in self.unanswered
            if dealer not in self.accused_by_more_than(most)
        }

    def disclosed_to(self, accuser: str) -> dict[str, bytes]:
        """Both shares of each dealer that has answered this accuser, by dealer."""
        return {
            dealer: share
            for dealer, answer in self.answers.items()
            for site, share in answer.shares
            if site == accuser
        }
