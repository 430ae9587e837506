"""A hospital that a test asks by hand, and a watch over what this process does to its data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message

from cloister_fl.client import app as client
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.site.trusted_roster import accept
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster, RosterEntry, sign_roster
from cloister_fl.protocol.round_messages import (
    SITE_KEY,
    Evaluated,
    Exchanged,
    Prepared,
    Refusal,
    RoundMessage,
    Update,
    pack,
    unpack,
)
from cloister_fl.server.flower.engines import InProcessGrid
from cloister_fl.server.rounds.messenger import TYPES
from cloister_fl.study.schema import Study
from support.federations import NAMES, write_cohort

SPONSOR = Identity.generate()


@dataclass
class Watch:
    """What this process did to the folders under watch, or began in another process."""

    folders: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folders:
            return
        if event in {"open", "os.listdir", "os.scandir"}:
            path = arguments[0]
            if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(
                self.folders
            ):
                self.seen.append(f"{event} {os.fsdecode(path)}")
        elif event in {"subprocess.Popen", "os.fork", "os.posix_spawn"}:
            self.seen.append(event)


WATCH = Watch()
sys.addaudithook(WATCH.hook)  # It cannot be taken away again, so there is one.


def fits(asked: Study) -> dict[str, Any]:
    """A policy that allows all that these tests ask for."""
    return {
        "patients_at_most": 1_000,
        "max_epsilon_study": 6.0,
        "max_epsilon_lifetime": 100.0,
        "require_secure_aggregation": False,
        "allow_without_privacy": True,
        "networks": ("small-cnn",),
        "modalities": ("DX",),
        "metrics": ("score-histograms",),
        "approve": "listed",
        "approved_hashes": (asked.digest,),
        "trusted_signers": (SPONSOR.public.hex(),),
    }


def write_hospital(root: Path, policy: dict[str, Any]) -> Site:
    """A site ``anker`` below ``root``: 24 patients of one image, and a trusted roster of five."""
    write_cohort(root / "anker", np.random.default_rng(0), "MRN", patients=24, images=1)
    site = init_site(root / "anker", name="anker", policy=Policy(**policy))
    keys = {name: Identity.generate().public for name in NAMES} | {"anker": site.identity().public}
    roster = Roster.of("north", 1, [RosterEntry(name, key) for name, key in keys.items()])
    accept(site.roster, sign_roster(roster, SPONSOR), SPONSOR.public, confirmed=roster.digest)
    return site


def ask(
    site: Site,
    task: RoundMessage,
    client_app: Callable[[Message, Context], Message] = client.app,
) -> RoundMessage:
    """What the site's ClientApp answers to a message, through Flower's records."""
    grid = InProcessGrid(client_app, [{SITE_KEY: str(site.root)}])
    message = Message(content=pack(task), dst_node_id=2, message_type=TYPES[task.kind])
    (reply,) = grid.send_and_receive([message])
    assert not reply.has_error()
    return unpack(reply.content, Refusal, Prepared, Update, Evaluated, Exchanged)


def rounds_charged(site: Site) -> list[int]:
    """The rounds that the ledger counts as started, oldest first."""
    if not site.ledger.exists():
        return []
    ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    return [int(entry.body["round"]) for entry in ledger.entries() if entry.kind == "started"]
