"""What a site answers in a study with privacy says nothing of its data, whatever happens to them.

The steward approves a study with the data as they are; then the data are removed, swapped, torn or
relabelled, and the site is asked. All that its answers show must be what they showed without: who
answers, with which kind of message, which fields, sizes and reasons, and which number its audit log
has come to. Only the noised or masked values, keys and seals may be others.

Each message goes to a process of its own, as after a restart: nothing is remembered of the data.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister_fl import secagg
from cloister_fl.client import app as client
from cloister_fl.client.app import SiteApp
from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.data.loading import read_for_check
from cloister_fl.client.site.data_notice import data_notices
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.approval import approve
from cloister_fl.errors import UpdateInvalid
from cloister_fl.networks import flat_parameters
from cloister_fl.protocol.round_messages import (
    SITE_KEY,
    EvaluateTask,
    Finish,
    Prepare,
    Refusal,
    RoundMessage,
    TrainTask,
    Update,
    octets,
    pack,
    unpack,
)
from cloister_fl.secagg.messages.codec import Bundle
from cloister_fl.server.flower.engines import InProcessGrid
from cloister_fl.server.rounds.messenger import TYPES
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.schema import Study
from cloister_fl.study.study_network import build_for
from support import segmented_site, studies
from support.damaged_data import OF_FILES, OF_LABELS, Damage, images, rows, write_rows
from support.federations import NAMES, study, write_cohort, write_federation

pytestmark = pytest.mark.process

PLAIN = study(
    training="rounds = 2\nsteps = 1",
    aggregation="secure = false",
    evaluation="release_epsilon = 1.0\nsite_fraction = 0.5",
)
POLICY: Mapping[str, Any] = {
    "patients_at_most": 1_000,
    "max_epsilon_study": 12.0,
    "max_epsilon_lifetime": 100.0,
    "require_secure_aggregation": False,
    "metrics": ("score-histograms",),
    "min_patients": 1,
    "min_patients_per_class": 3,
}
OUTLINED = studies.bound(
    input=segmented_site.SPEC.model_dump(),
    target={"kind": "segmentation", "segment": "lungs", "column": None, "classes": None},
    network={"name": "unet", "arguments": {"width": 4}},
    training="rounds = 1\nsteps = 1\nsampling_rate = 1.0\nexpected_batch = 6",
    aggregation="secure = false",
)
MOMENTS = ("prepare", "train", "evaluate")


def shown(records: RecordDict) -> list[object]:
    """All that a message shows, but values that are noised, masked or sealed, keys and hashes."""
    told: list[object] = []
    for name, record in sorted(records.items()):
        for key, value in sorted(record.items()):
            if isinstance(record, ArrayRecord):
                told.append((name, key, value.dtype, value.shape, value.stype, len(value.data)))
                if key == "exchange":
                    told.append(_parts(value.data))
            elif key == "log_head":
                # Whose log it is; the hashes are of salts and times, too.
                told.append((name, key, str(value).partition(":")[0], len(str(value))))
            elif key == "ledger":
                # A hash of the ledger's first entry: each copy of the site makes one of its own.
                told.append((name, key, len(str(value))))
            elif isinstance(value, bytes):
                told.append((name, key, len(value)))
            else:
                told.append((name, key, value))
    return told


def _parts(data: bytes) -> list[object]:
    bundle = secagg.decode(data)
    assert isinstance(bundle, Bundle)
    return [(type(part).__name__, len(part.encode())) for part in bundle.parts]


@dataclass
class Hospital:
    """A site whose steward has approved a study, to be copied and asked."""

    site: Site
    asked: Study

    def copy(self, root: Path) -> Site:
        if root.exists():
            shutil.rmtree(root)
        shutil.copytree(self.site.root, root)
        return open_site(root)

    def tasks(self) -> Iterator[tuple[str, RoundMessage]]:
        """The messages of a run, in order."""
        text, last = self.asked.canonical(), self.asked.training.rounds
        model = flat_parameters.flatten(build_for(self.asked, models=self.site.root))
        yield "prepare", Prepare(text, "run", 5, "", b"", "")
        for number in range(1, last + 1):
            yield "train", TrainTask(text, "run", number, 5, octets(), model)
        if self.asked.releases:
            yield "evaluate", EvaluateTask(text, "run", last, 5, octets(), model)
        yield "finish", Finish(self.asked.digest, "run")

    def answers(
        self, site: Site, damage: Damage, moment: str, *, updates: list[Any] | None = None
    ) -> list[list[object]]:
        """What the site shows in a run in which its data are damaged before a kind of message.

        Args:
            site: a copy.
            damage: what happens to its data.
            moment: the kind of message before which it does.
            updates: gets the updates themselves.
        """
        found, done = [], False
        for kind, task in self.tasks():
            if kind == moment and not done:
                damage(site)
                done = True
            # A new process remembers nothing.
            grid = InProcessGrid(SiteApp(), [{SITE_KEY: str(site.root)}])
            message = Message(content=pack(task), dst_node_id=2, message_type=TYPES[kind])
            (reply,) = grid.send_and_receive([message])
            assert not reply.has_error()
            found.append(shown(reply.content))
            if kind == "train" and updates is not None:
                updates.append(unpack(reply.content, Update).vector)
        return found


def _approved(root: Path, asked: Study) -> Hospital:
    site = init_site(root, name="anker", policy=Policy(**POLICY))
    approve(site, asked, read_for_check(site, asked))
    return Hospital(site, asked)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    root = tmp_path_factory.mktemp("hospital") / "anker"
    write_cohort(root, np.random.default_rng(0), "MRN", patients=10, images=2)
    return _approved(root, PLAIN)


@pytest.fixture(scope="module")
def outlined(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    root = tmp_path_factory.mktemp("outlined") / "anker"
    segmented_site.write(root, patients=5)
    return _approved(root, OUTLINED)


@pytest.fixture(scope="module")
def usual(hospital: Hospital, tmp_path_factory: pytest.TempPathFactory) -> list[list[object]]:
    site = hospital.copy(tmp_path_factory.mktemp("usual") / "anker")
    return hospital.answers(site, lambda _: None, "prepare")


def test_an_undamaged_site_takes_part(usual: list[list[object]]) -> None:
    """Or all sites could refuse alike below."""
    kinds = [{e[1]: e[2] for e in one if len(e) == 3}["kind"] for one in usual]
    assert kinds == ["prepared", "update", "update", "evaluated", "finished"]


def test_the_end_of_a_run_that_never_was_makes_no_ledger(
    hospital: Hospital, tmp_path: Path
) -> None:
    site = hospital.copy(tmp_path / "anker")
    grid = InProcessGrid(SiteApp(), [{SITE_KEY: str(site.root)}])
    task = Finish(PLAIN.digest, "run")
    message = Message(content=pack(task), dst_node_id=2, message_type=TYPES["finish"])
    (reply,) = grid.send_and_receive([message])
    assert unpack(reply.content, Refusal).reason == "message"
    assert not site.ledger.exists()


QUICK = {"nothing", "no_files_and_no_labels", "a_class_gone", "a_stray_quotation_mark"}


@pytest.mark.parametrize(
    ("damage", "moment"),
    [
        pytest.param(
            damage,
            moment,
            id=f"{name} before {moment}",
            marks=() if name in QUICK else pytest.mark.slow,
        )
        for name, damage in {**OF_FILES, **OF_LABELS}.items()
        for moment in MOMENTS
    ],
)
def test_no_damage_shows(
    hospital: Hospital, usual: list[list[object]], damage: Damage, moment: str, tmp_path: Path
) -> None:
    site = hospital.copy(tmp_path / "anker")
    assert hospital.answers(site, damage, moment) == usual


@pytest.mark.parametrize("name", ["load_for_run", "train_round", "counts_in_units"])
def test_no_fault_while_the_patients_are_looked_at_shows(
    hospital: Hospital,
    usual: list[list[object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Such as memory that runs out with so many patients."""
    honest = getattr(client, name)
    met: list[str] = []

    def fails(*given: Any, **named: Any) -> Any:
        if any(isinstance(one, Cohort) and not one.patients for one in given):
            return honest(*given, **named)
        if name == "load_for_run" and not met:
            # At the start of the run; what it fails with is no error of Cloister's.
            met.append(name)
            return honest(*given, **named)
        met.append(name)
        raise MemoryError("MRN-000")

    monkeypatch.setattr(client, name, fails)
    site = hospital.copy(tmp_path / "anker")
    assert hospital.answers(site, lambda _: None, "prepare") == usual
    assert met
    notice = data_notices(site.root)[PLAIN.digest]
    assert "MemoryError" in notice.message
    assert "MRN" not in notice.message


def test_weights_that_are_not_finite_do_not_show(
    hospital: Hospital, usual: list[list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*_: object, **__: object) -> None:
        raise UpdateInvalid("Training produced weights that are not finite.")

    monkeypatch.setattr(client, "train_round", diverges)
    site = hospital.copy(tmp_path / "anker")
    updates: list[Any] = []
    assert hospital.answers(site, lambda _: None, "prepare", updates=updates) == usual
    assert len(updates) == 2
    assert not any(vector.any() for vector in updates)
    assert data_notices(site.root)[PLAIN.digest].code == "CLO-403"


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        pytest.param(
            name,
            moment,
            id=f"{name}-{moment}",
            marks=() if moment == "prepare" and name in QUICK else pytest.mark.slow,
        )
        for name in OF_FILES
        # A study of masks without a release: nothing is read after its rounds.
        for moment in MOMENTS[:2]
    ],
)
def test_no_damage_shows_in_a_study_of_masks(
    outlined: Hospital, name: str, moment: str, tmp_path: Path
) -> None:
    site = outlined.copy(tmp_path / "usual" / "anker")
    usual = outlined.answers(site, lambda _: None, "prepare")
    site = outlined.copy(tmp_path / "damaged" / "anker")
    assert outlined.answers(site, OF_FILES[name], moment) == usual
    if name in {"no_files", "one_patient_removed", "files_cut_short"}:
        assert outlined.asked.digest in data_notices(site.root)


def test_segmentations_that_are_gone_do_not_show(outlined: Hospital, tmp_path: Path) -> None:
    def unmarked(site: Site) -> None:
        for path in site.dicom.glob("*-0-seg.dcm"):
            path.unlink()

    usual = outlined.answers(outlined.copy(tmp_path / "u" / "anker"), lambda _: None, "prepare")
    site = outlined.copy(tmp_path / "d" / "anker")
    assert outlined.answers(site, unmarked, "prepare") == usual
    assert "its label changed" in data_notices(site.root)[outlined.asked.digest].message


def _by_hand(site: Site, choices: list[tuple[int, str]], lines: list[tuple[int, str]]) -> None:
    """Damage single files and rows."""
    found = images(site)
    for number, how in choices:
        path = found[number % len(found)]
        if not path.is_file():
            continue
        match how:
            case "gone":
                path.unlink()
            case "cut":
                path.write_bytes(path.read_bytes()[: number * 37])
            case "flipped":
                data = bytearray(path.read_bytes())
                data[(number * 7919) % len(data)] ^= 1 << number % 8
                path.write_bytes(bytes(data))
            case "another's":
                path.write_bytes(found[-1].read_bytes() if found[-1].is_file() else b"")
            case "copied":
                shutil.copy(path, path.with_name(f"{number}-again"))
    table = rows(site)
    for number, how in lines:
        place = number % len(table)
        match how:
            case "gone":
                del table[place : place + 1]
            case "other":
                table[place] = [*table[place][:1], "yes"]
            case "long":
                table[place] = [*table[place], "x"]
            case "empty":
                table[place] = ["", ""]
            case "quoted":
                table[place] = [f'"{number}', '"']
        table = table or [["PatientID", "finding"]]
    write_rows(site, table)


@pytest.mark.slow
@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    choices=st.lists(
        st.tuples(
            st.integers(0, 10**4),
            st.sampled_from(["gone", "cut", "flipped", "another's", "copied"]),
        ),
        max_size=12,
    ),
    lines=st.lists(
        st.tuples(
            st.integers(0, 30), st.sampled_from(["gone", "other", "long", "empty", "quoted"])
        ),
        max_size=4,
    ),
    moment=st.sampled_from(MOMENTS),
)
def test_no_damage_to_single_files_and_rows_shows(
    hospital: Hospital,
    usual: list[list[object]],
    tmp_path: Path,
    choices: list[tuple[int, str]],
    lines: list[tuple[int, str]],
    moment: str,
) -> None:
    site = hospital.copy(tmp_path / "anker")
    found = hospital.answers(site, lambda one: _by_hand(one, choices, lines), moment)
    assert found == usual


# Under secure aggregation


class Tap:
    """The product's ClientApp in a new process for each message but those of one sum; the data of
    one site are damaged before a kind of message."""

    def __init__(self, damage: Damage, moment: str) -> None:
        self.damage: Callable[[Site], None] | None = damage
        self.moment = moment
        self.seen: list[list[object]] = []
        self._app = SiteApp()

    def __call__(self, message: Message, context: Context) -> Message:
        root = Path(str(context.node_config[SITE_KEY]))
        ours = root.name == "anker"
        if ours and message.metadata.message_type == TYPES[self.moment] and self.damage:
            self.damage(open_site(root))
            self.damage = None
        # Keys of secure aggregation live in the process; what is known of the data need not.
        self._app.kept._cohorts.clear()
        self._app.kept._rows._rows.clear()
        reply = self._app(message, context)
        if ours:
            self.seen.append(shown(reply.content))
        return reply


SECURE = {
    "classes": study(
        training="rounds = 1\nsteps = 1",
        evaluation="release_epsilon = 1.0\nsite_fraction = 0.5",
    ),
    "masks": studies.bound(
        input=segmented_site.SPEC.model_dump(),
        target={"kind": "segmentation", "segment": "lungs", "column": None, "classes": None},
        network={"name": "unet", "arguments": {"width": 4}},
        training="rounds = 1\nsteps = 1\nsampling_rate = 1.0\nexpected_batch = 6",
    ),
}


@pytest.fixture(scope="module", params=["classes", pytest.param("masks", marks=pytest.mark.slow)])
def federation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Study, Path]:
    asked, root = SECURE[request.param], tmp_path_factory.mktemp("secure")
    if request.param == "masks":
        for name in NAMES:
            segmented_site.write(root / name, patients=4)
    else:
        write_federation(root, patients=8, images=1)
    for name in NAMES:
        _approve(root / name, asked)
    return asked, root


def _approve(folder: Path, asked: Study) -> None:
    site = init_site(folder, name=folder.name, policy=Policy(**POLICY))
    approve(site, asked, read_for_check(site, asked))


def _seen(federation: tuple[Study, Path], root: Path, damage: Damage, moment: str) -> list[Any]:
    asked, sites = federation
    shutil.copytree(sites, root / "sites")
    tap = Tap(damage, moment)
    run_simulation(Simulation(asked, root / "sites", root / "run"), client_app=tap)
    assert tap.damage is None
    return tap.seen


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["prepare", pytest.param("train", marks=pytest.mark.slow)])
def test_no_damage_shows_under_secure_aggregation(
    federation: tuple[Study, Path], tmp_path: Path, moment: str
) -> None:
    usual = _seen(federation, tmp_path / "usual", lambda _: None, moment)
    assert len(usual) > 4
    names = ["no_files", "files_of_rubbish", "one_patient_removed"]
    for name in names:
        assert _seen(federation, tmp_path / name, OF_FILES[name], moment) == usual, name
