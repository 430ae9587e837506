"""Participants of a run: sites are asked to take part, again where the run can wait."""

from __future__ import annotations

import time
from collections.abc import Collection

from cloister_fl.encoding.canonical_json import HASH
from cloister_fl.membership.identity import verify
from cloister_fl.membership.roster import SITE_ID, Roster
from cloister_fl.protocol.round_messages import (
    Prepare,
    Prepared,
    Refusal,
    Refused,
    signed_answer,
    taking_part,
)
from cloister_fl.secagg.parameters import Parameters
from cloister_fl.server.rounds.collector import LATE, OTHER_LEDGER, REASONS, require_sites
from cloister_fl.server.rounds.events import Hooks, Patience, Waiting
from cloister_fl.server.rounds.messenger import SILENT, Messenger
from cloister_fl.study.schema import Study


class Participants:
    """The sites of a run.

    Args:
        messenger: sends messages to the federation.
        study: what is proposed.
        hooks: how to wait, and whom to tell.
        expected: sites that are waited for before the first round.
        roster: the federation's; needed with secure aggregation.
        signatures: who vouches for the study, see ``study.signatures``.

    Attributes:
        nodes: site by Flower's node id, of those that take part.
        refused: reason by site, of those that do not, or not now.
        asked: how many sites were asked.
    """

    def __init__(
        self,
        messenger: Messenger,
        study: Study,
        hooks: Hooks,
        *,
        expected: int,
        roster: Roster | None,
        signatures: bytes,
    ) -> None:
        self.nodes: dict[int, str] = {}
        self.refused: dict[str, str] = {}
        self.asked = 0
        self._messenger = messenger
        self._study = study
        self._canonical = study.canonical()
        self._hooks = hooks
        self._expected = expected
        self._roster = roster
        self._signatures = signatures
        self._noted = False

    @property
    def sites(self) -> tuple[str, ...]:
        """Ids of the sites that take part, rising."""
        return tuple(sorted(self.nodes.values()))

    def begin(self, run: str, invited: tuple[str, ...]) -> tuple[str, ...]:
        """Find the participants; return the sites that the run invited.

        Args:
            run: its id.
            invited: whom a resumed run began with; else nobody.

        Raises:
            TooFewSites: fewer than are needed take part, and the run does not wait.
        """
        patience = self._hooks.patience
        needed = self._study.aggregation.min_sites
        if self._study.aggregation.secure and invited:
            needed = self._fewest(invited)
        if patience is None:
            ready = self._ask(self._messenger.wait_for_nodes(self._expected), run, invited)
            require_sites(needed, len(ready), self.asked, self.refused)
        else:
            self._await(patience, run, invited, needed, all_of=patience.begin)
        # From here on, a node that comes is a site's that began anew.
        self._noted = True
        # Whom a run invited stays as it was: two sums over other sites could be compared.
        return invited or self.sites

    def again(self, patience: Patience, run: str, invited: tuple[str, ...]) -> None:
        """Wait in the middle of a run until enough sites are ready for a round."""
        secure = self._study.aggregation.secure
        needed = self._fewest(invited) if secure else self._study.aggregation.min_sites
        self._await(patience, run, invited, needed)

    def seats(self) -> str:
        """Nodes and their sites, for the log."""
        return " ".join(f"{node}={site}" for node, site in sorted(self.nodes.items()))

    def told_refused(self) -> str:
        """Sites that refused and why, for the log: reasons of the closed list only."""
        known = {
            name: reason if reason in REASONS else Refused.DECLINED.value
            for name, reason in self.refused.items()
        }
        return "; ".join(f"{name}={reason}" for name, reason in sorted(known.items()))

    def _fewest(self, invited: tuple[str, ...]) -> int:
        return Parameters.derive(len(invited), self._study.aggregation.colluders).m

    def _ask(self, nodes: Collection[int], run: str, invited: tuple[str, ...]) -> set[int]:
        """Ask nodes whether they take part; return the ready ones. Asking again changes nothing.

        A site outside its training window takes part: it belongs to those whom the run invites,
        and is not ready.
        """
        roster, heads = "", ""
        if self._roster is not None:
            roster = self._roster.digest.hex()
            heads = self._messenger.heads(self._roster, self.nodes)
        self.asked = max(self._expected, len(nodes), self.asked)
        task = Prepare(self._canonical, run, self.asked, roster, self._signatures, heads)
        ready: set[int] = set()
        for reply in self._messenger.ask(nodes, task, Prepared):
            message = reply.message
            known = self.nodes.get(reply.node)
            later = isinstance(message, Refusal) and message.reason == Refused.HOURS
            if not self._is_signed(message, reply.node, run):
                self.refused[known or f"node {reply.node}"] = (
                    message.reason if isinstance(message, Refusal) else Refused.MESSAGE.value
                )
            elif isinstance(message, Refusal) and not (later and message.site):
                self.refused[message.site or known or f"node {reply.node}"] = message.reason
            elif message.site in self.nodes.values() and message.site != known:
                self.refused[f"{message.site} (second node)"] = Refused.MESSAGE.value
            elif invited and message.site not in invited:
                self.refused[message.site] = LATE
            elif isinstance(message, Prepared) and not self._messenger.knows_ledger(
                message.site, message.ledger
            ):
                self.refused[message.site] = OTHER_LEDGER
            else:
                if known is None and self._noted:
                    self._messenger.note("seated", run=run, sites=f"{reply.node}={message.site}")
                self.nodes[reply.node] = message.site
                self.refused.pop(f"node {reply.node}", None)
                if later:
                    self.refused[message.site] = Refused.HOURS.value
                else:
                    self.refused.pop(message.site, None)
                    ready.add(reply.node)
        return ready

    def _await(
        self,
        patience: Patience,
        run: str,
        invited: tuple[str, ...],
        needed: int,
        *,
        all_of: float = 0.0,
    ) -> None:
        """Wait until enough sites say yes; for ``all_of`` seconds more, until all of them do."""
        pause, told, enough_since = patience.soonest, "", 0.0
        agreed: set[int] = set()
        online: set[int] = set()
        while True:
            self._hooks.check()
            before, online = online, set(self._messenger.nodes())
            if online - before:
                pause = patience.soonest
            agreed &= online
            if online - agreed:
                # All at once: each reads its patients before it says yes.
                agreed |= self._ask(online - agreed, run, invited)
            everyone = len(invited) or self._expected
            if len(agreed) >= needed:
                enough_since = enough_since or time.monotonic()
                answered = len(agreed) + self._noes()
                if answered >= everyone or time.monotonic() - enough_since >= all_of:
                    return
            waiting = Waiting(len(agreed), needed, dict(self.refused))
            if repr(waiting) != told:
                told = repr(waiting)
                self._hooks.notify(waiting)
            time.sleep(pause)
            pause = min(patience.latest, 1.5 * pause)

    def _noes(self) -> int:
        """Count the sites that refused; unapproved or silent ones may still join."""
        later = {Refused.APPROVAL.value, Refused.HOURS.value, SILENT}
        return sum(
            reason not in later for name, reason in self.refused.items() if "node " not in name
        )

    def _is_signed(self, message: Prepared | Refusal, node: int, run: str) -> bool:
        """Return whether the site signed its answer; without a roster, no key is known.

        Even then a site's name is one, and a ledger's: they go into the log and the report.
        """
        ledger = message.ledger if isinstance(message, Prepared) else ""
        if ledger and not HASH.fullmatch(ledger):
            return False
        if self._roster is None:
            nameless = isinstance(message, Refusal) and not message.site
            return nameless or SITE_ID.fullmatch(message.site) is not None
        word = (
            message.reason
            if isinstance(message, Refusal)
            else taking_part(run, self._study.digest, message.ledger)
        )
        public = self._roster.public_key(message.site)
        said = signed_answer(message.site, node, word)
        return public is not None and verify(public, message.signature, *said)
