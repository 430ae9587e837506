"""The site's part in secure aggregation, held against a server that this file plays itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cloister_fl import secagg
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.secure_aggregation.exchange import Exchange, Members, require_roster
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.site.trusted_roster import accept
from cloister_fl.errors import BudgetExhausted, RosterMismatch, WireInvalid
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster, RosterEntry, sign_roster
from cloister_fl.protocol import sessions
from cloister_fl.protocol.round_messages import Vector, octets
from cloister_fl.secagg.messages.codec import Abort, Bundle, Masked, Message
from cloister_fl.study.schema import Study
from support.federations import NAMES, study
from support.spending import admission

MODEL = np.arange(40, dtype=np.float32)
OTHER = MODEL + 1


class Hospitals:
    """Five site folders under one roster, and the server's epochs over them."""

    def __init__(self, root: Path, asked: Study, policy: Policy) -> None:
        self.study = asked
        self.sites = {name: init_site(root / name, name=name, policy=policy) for name in NAMES}
        entries = [RosterEntry(n, site.identity().public) for n, site in self.sites.items()]
        self.roster = Roster.of("north", 1, entries)
        key = Identity.generate()
        for site in self.sites.values():
            signed = sign_roster(self.roster, key)
            accept(site.roster, signed, key.public, confirmed=self.roster.digest)
        self.epochs = 0
        self.members = Members()

    def exchange(self, name: str, *parts: Message) -> Exchange:
        return self.exchange_of(name, Bundle(parts))

    def exchange_of(self, name: str, message: Message) -> Exchange:
        site = self.sites[name]
        data = octets(message.encode())
        admitted = admission(self.study, "run")
        return Exchange(SiteSession(site), admitted, site.roster, data, self.members)

    def ask(self, name: str, *parts: Message) -> tuple[Message, ...]:
        with self.exchange(name, *parts) as opened:
            return _parts(opened.answer())

    def close(self) -> None:
        for site in self.sites.values():
            self.members.forget(site.root)

    def session(self, number: int = 1, attempt: int = 0, model: Vector = MODEL) -> secagg.Session:
        return sessions.update_session(
            self.study,
            sorted(self.sites),
            round_number=number,
            attempt=attempt,
            model=model,
        )

    def epoch(self, session: secagg.Session) -> secagg.ServerEpoch:
        self.epochs += 1
        terms = secagg.EpochTerms(
            federation="north",
            study=bytes.fromhex(self.study.digest),
            roster=self.roster.digest,
            run="run",
            epoch=self.epochs,
            invited=tuple(sorted(self.sites)),
            colluders=self.study.aggregation.colluders,
        )
        epoch = secagg.ServerEpoch(terms, self.roster)
        for name in self.sites:
            (record,) = self.ask(name, epoch.advertise_request())
            epoch.receive_advertisement(record)  # type: ignore[arg-type]
        for name in self.sites:
            (shares,) = self.ask(name, epoch.share_request())
            epoch.receive_shares(shares)  # type: ignore[arg-type]
        epoch.start(session)
        return epoch

    def answer(
        self,
        epoch: secagg.ServerEpoch,
        expected: secagg.Session,
        trained: list[str],
        *,
        run: str = "run",
        name: str = "anker",
    ) -> Message:
        def produce() -> Vector:
            trained.append(run)
            return MODEL / 100

        return answered(self.exchange(name, epoch.mask_request(name)), expected, produce, run=run)


def answered(
    exchange: Exchange, expected: secagg.Session, produce: Callable[[], Vector], *, run: str = "run"
) -> Message:
    """Answer a mask request as the app does; its charge and its training are ``produce``."""
    with exchange as opened:
        if opened.open(expected, run=run):
            opened.keep(produce())
        opened.mask(saturate=True)
        (reply,) = _parts(opened.answer())
        return reply


def _parts(data: bytes) -> tuple[Message, ...]:
    bundle = secagg.decode(data)
    assert isinstance(bundle, Bundle)
    return bundle.parts


@pytest.fixture
def hospitals(tmp_path: Path) -> Iterator[Hospitals]:
    made = Hospitals(tmp_path, study(), Policy(patients_at_most=1_000, max_epsilon_study=6))
    yield made
    made.close()


def test_a_second_attempt_masks_the_very_update(hospitals: Hospitals) -> None:
    trained: list[str] = []
    for attempt in range(3):
        session = hospitals.session(attempt=attempt)
        assert isinstance(hospitals.answer(hospitals.epoch(session), session, trained), Masked)
    assert trained == ["run"]


@pytest.mark.parametrize("other", ["run", "model", "round"])
def test_a_kept_update_serves_nothing_else(hospitals: Hospitals, other: str) -> None:
    trained: list[str] = []
    first = hospitals.session()
    hospitals.answer(hospitals.epoch(first), first, trained)
    second = hospitals.session(
        number=2 if other == "round" else 1, model=OTHER if other == "model" else MODEL
    )
    run = "later" if other == "run" else "run"
    hospitals.answer(hospitals.epoch(second), second, trained, run=run)
    assert trained == ["run", run]


def test_a_request_replayed_with_another_model_trains_nothing(hospitals: Hospitals) -> None:
    trained: list[str] = []
    session = hospitals.session()
    epoch = hospitals.epoch(session)
    assert isinstance(hospitals.answer(epoch, session, trained), Masked)
    reply = hospitals.answer(epoch, hospitals.session(model=OTHER), trained)
    assert isinstance(reply, Abort)
    assert reply.code == "CLO-715"
    assert trained == ["run"]


def test_a_lost_answer_is_given_again_to_the_byte(hospitals: Hospitals) -> None:
    trained: list[str] = []
    session = hospitals.session()
    epoch = hospitals.epoch(session)
    first = hospitals.answer(epoch, session, trained)
    assert hospitals.answer(epoch, session, trained).encode() == first.encode()
    assert trained == ["run"]


def test_two_messages_at_once_mask_one_model(hospitals: Hospitals) -> None:
    """While the site trains one model, the same request comes with another."""
    session, lie = hospitals.session(), hospitals.session(model=OTHER)
    epoch = hospitals.epoch(session)
    training, go_on = threading.Event(), threading.Event()
    replies: dict[str, Message] = {}

    def slow() -> Vector:
        training.set()
        assert go_on.wait(10)
        return MODEL / 100

    def honest() -> None:
        exchange = hospitals.exchange("anker", epoch.mask_request("anker"))
        replies["honest"] = answered(exchange, session, slow)

    def lying() -> None:
        assert training.wait(10)
        replies["lie"] = hospitals.answer(epoch, lie, [])

    threads = [threading.Thread(target=target) for target in (honest, lying)]
    for thread in threads:
        thread.start()
    training.wait(10)
    threads[1].join(0.5)  # Time enough for the lie to be answered, if it is not made to wait.
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert isinstance(replies["honest"], Masked)
    assert isinstance(replies["lie"], Abort)


def test_an_epoch_is_over_when_training_fails(hospitals: Hospitals) -> None:
    session = hospitals.session()
    epoch = hospitals.epoch(session)

    def fails() -> Vector:
        raise BudgetExhausted("No budget.")

    with pytest.raises(BudgetExhausted):
        answered(hospitals.exchange("anker", epoch.mask_request("anker")), session, fails)
    trained: list[str] = []
    reply = hospitals.answer(epoch, session, trained)
    assert isinstance(reply, Abort)
    assert reply.code == "CLO-717"
    assert trained == []


def test_two_vectors_in_one_message_are_refused(hospitals: Hospitals) -> None:
    session = hospitals.session()
    one, two = hospitals.epoch(session), hospitals.epoch(session)
    with pytest.raises(WireInvalid, match="requests two vectors"):
        hospitals.exchange("anker", one.mask_request("anker"), two.mask_request("anker"))


def test_what_is_no_bundle_is_refused(hospitals: Hospitals) -> None:
    session = hospitals.session()
    single = hospitals.epoch(session).mask_request("anker")
    with pytest.raises(WireInvalid, match="bundle"):
        hospitals.exchange_of("anker", single)


@pytest.mark.parametrize(
    ("policy", "lines"),
    [
        (Policy(patients_at_most=1_000, min_sites=6), "min_sites = 6"),
        (Policy(patients_at_most=1_000, min_sites=5), "min_sites = 6"),
    ],
    ids=["policy", "study"],
)
def test_the_site_itself_counts_the_invited(tmp_path: Path, policy: Policy, lines: str) -> None:
    made = Hospitals(tmp_path, study(aggregation=lines), policy)
    with pytest.raises(AttributeError):  # The server is handed an abort where it wants keys.
        made.epoch(made.session())
    terms = secagg.EpochTerms(
        "north",
        bytes.fromhex(made.study.digest),
        made.roster.digest,
        "run",
        9,
        tuple(sorted(made.sites)),
        1,
    )
    (reply,) = made.ask("anker", secagg.ServerEpoch(terms, made.roster).advertise_request())
    assert isinstance(reply, Abort)
    assert reply.code == "CLO-701"
    made.close()


@pytest.mark.parametrize("allowed", [1.0, 2.0])
def test_the_site_itself_bounds_the_weights(tmp_path: Path, allowed: float) -> None:
    """Where the epoch opens, whatever the gate before it has let in."""
    policy = Policy(patients_at_most=1_000, max_epsilon_study=6, max_weight_ratio=allowed)
    made = Hospitals(tmp_path, study(aggregation="weights = { anker = 2.0 }"), policy)
    session, trained = made.session(), list[str]()
    reply = made.answer(made.epoch(session), session, trained)
    if allowed == 1.0:
        assert isinstance(reply, Abort)
        assert (reply.code, trained) == ("CLO-721", [])
    else:
        assert isinstance(reply, Masked)
        assert trained == ["run"]
    made.close()


def test_another_key_than_the_roster_s_takes_no_part(hospitals: Hospitals, tmp_path: Path) -> None:
    digest = hospitals.roster.digest.hex()
    sites = hospitals.sites
    session, pin = SiteSession(sites["anker"]), sites["anker"].roster
    require_roster(session, pin, digest)
    stranger = SiteSession(init_site(tmp_path / "stranger", name="anker"))
    with pytest.raises(RosterMismatch, match="does not list this site"):
        require_roster(stranger, pin, digest)
    with pytest.raises(RosterMismatch, match="another roster"):
        require_roster(session, pin, "00" * 32)


def test_few_studies_are_kept_alive_for_a_hospital(tmp_path: Path) -> None:
    made = Hospitals(tmp_path, study(), Policy(patients_at_most=1_000, max_epsilon_study=6))
    root = made.sites["anker"].root
    for number in range(10):
        made.study = study(study=f'name = "study-{number}"')
        made.session()
        made.exchange("anker")
    assert made.members.count(root) == 4
    assert Members().count(root) == 0
    made.members.forget(root)
    assert made.members.count(root) == 0


def test_a_changed_policy_counts_at_once(hospitals: Hospitals) -> None:
    site = hospitals.sites["anker"]
    terms_of = hospitals.epoch(hospitals.session()).terms
    text = (site.root / "site.toml").read_text()
    (site.root / "site.toml").write_text(text.replace("min_sites = 5", "min_sites = 500"))
    from cloister_fl.client.site.folder import open_site

    hospitals.sites["anker"] = open_site(site.root)
    later = secagg.ServerEpoch(
        secagg.EpochTerms(
            terms_of.federation, terms_of.study, terms_of.roster, "run", 77, terms_of.invited, 1
        ),
        hospitals.roster,
    )
    (reply,) = hospitals.ask("anker", later.advertise_request())
    assert isinstance(reply, Abort)


def test_nothing_is_charged_by_the_protocol_itself(hospitals: Hospitals) -> None:
    session = hospitals.session()
    hospitals.answer(hospitals.epoch(session), session, [])
    site: Site = hospitals.sites["anker"]
    ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    assert {entry.kind for entry in ledger.entries()} == {"created", "epoch", "round"}
