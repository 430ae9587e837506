"""Every message that leaves a hospital, field by field; and what of it one patient can change.

Two federations run whole, which differ in one patient at one hospital. Everything that a message
shows beside noised or masked values must be the same: who answered, how often, with which fields,
of which sizes, under which weights, with which reason. The lists stand here a second time, so that
a new field turns a test red.
"""

from __future__ import annotations

import csv
import functools
import shutil
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.app import RecordDict as Records
from numpy.typing import NDArray

from cloister_fl import secagg
from cloister_fl.client.app import app
from cloister_fl.client.training.dp_optimizer import PatientDPOptimizer
from cloister_fl.errors import RunError
from cloister_fl.protocol.round_messages import Refused
from cloister_fl.secagg import participant_epoch
from cloister_fl.secagg.messages.codec import Bundle, Masked, MaskRequest
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.schema import Study
from support.dicom import write_dicom
from support.federations import NAMES, study, write_federation
from support.message_tap import charges

EVERY = {"version", "kind", "log_head"}
LEAVES: dict[str, tuple[set[str], set[str]]] = {
    # kind: scalars, arrays
    "prepared": ({"site", "signature", "ledger"}, set()),
    "exchanged": ({"site", "round"}, {"exchange"}),
    "update": ({"site", "round"}, {"vector"}),
    "finished": ({"site"}, set()),
    "refusal": ({"site", "reason", "signature"}, set()),
}
PROTOCOL = {
    "advertise": {"kid", "site", "enc_pk", "mask_pk", "commitment", "signature"},
    "share": {"kid", "dealing", "boxes"},
    "complaint": {"kid", "keys", "site", "dealers", "signature"},
    "disclosure": {"kid", "site", "shares", "signature"},
    "mask": {"sid", "site", "u2_hash", "vector", "signature", "consent"},
    "consistent": {"sid", "site", "u3", "signature"},
    "unmask": {"sid", "site", "u3", "b_shares", "mask_key_shares", "signature"},
    "abort": {"kid", "site", "code", "signature"},
}

MASKED = study(privacy="epsilon = 6.0\nclipping_norm = 1.0", training="expected_batch = 8")
PLAIN = study(aggregation="secure = false", training="rounds = 2")


class Tap:
    """The product's ClientApp, and a copy of every message that leaves it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Records, Records]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        name = Path(str(context.node_config["site"])).name
        reply = app(message, context)
        assert not reply.has_error()
        metadata = reply.metadata
        assert metadata.message_type == message.metadata.message_type
        self.seen.append((name, metadata.message_type, message.content, reply.content))
        return reply

    def parts(self, sent: bool = True) -> Iterable[tuple[str, Any]]:
        for name, _, asked, said in self.seen:
            records = said if sent else asked
            if "arrays" in records and "exchange" in records["arrays"]:
                data = np.frombuffer(records["arrays"]["exchange"].data, np.uint8)  # type: ignore[call-overload]
                bundle = secagg.decode(data.tobytes()) if data.size else Bundle(())
                assert isinstance(bundle, Bundle)
                for part in bundle.parts:
                    yield name, part


def marking(tap: Tap) -> list[object]:
    """All that the messages show, but values that are noised, masked, sealed, keys or hashes."""
    told: list[object] = []
    for name, kind, _, records in tap.seen:
        shape: list[object] = []
        for record_name, record in sorted(records.items()):
            if isinstance(record, ArrayRecord):
                shape += [
                    (key, array.dtype, array.shape, array.stype, len(array.data))
                    for key, array in sorted(record.items())
                ]
            else:
                assert isinstance(record, ConfigRecord)
                for key, value in sorted(record.items()):
                    kept = key in {"kind", "site", "round", "reason", "version"}
                    shape.append((record_name, key, value if kept else _size(value)))
        told.append((name, kind, shape))
    for name, part in tap.parts():
        told.append((name, part.NAME, len(part.encode()), getattr(part, "u3", None)))
        if part.NAME == "abort":
            told.append(part.code)
    for name, part in tap.parts(sent=False):
        if isinstance(part, MaskRequest):
            told.append((name, part.session.weights, part.session.dimension))
    return told


def _size(value: object) -> object:
    if isinstance(value, str):
        # A head of the audit log: whose, its hash, and the one before.
        return [len(text) for text in value.split(":")]
    assert isinstance(value, bytes)
    return len(value)


def run(asked: Study, sites: Path, out: Path) -> Tap:
    tap = Tap()
    run_simulation(Simulation(asked, sites, out), client_app=tap)
    return tap


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("leaves") / "sites")


# One patient for another.


def _replace(folder: Path, label: str, images: list[NDArray[np.uint16]]) -> None:
    """Another person in the place of the eighth patient, with these images and this label."""
    shutil.rmtree(folder / "dicom" / "007")
    for number, pixels in enumerate(images):
        path = folder / "dicom" / "007" / f"{number}.dcm"
        write_dicom(path, pixels, patient_id="ANOTHER", bits_stored=12)
    rows = list(csv.reader((folder / "labels.csv").read_text("utf-8").splitlines()))
    rows[8] = ["ANOTHER", label]
    (folder / "labels.csv").write_text("\n".join(map(",".join, rows)) + "\n", encoding="utf-8")


def _noise(count: int) -> list[NDArray[np.uint16]]:
    drawn = np.random.default_rng(5).integers(0, 4096, (count, 36, 32))
    return [image.astype(np.uint16) for image in drawn]


def one_image(folder: Path) -> None:
    _replace(folder, "yes", _noise(1))


def thirty_images(folder: Path) -> None:
    _replace(folder, "yes", _noise(30))


def the_other_class(folder: Path) -> None:
    _replace(folder, "no", _noise(2))


def extreme_pixels(folder: Path) -> None:
    checks = (np.indices((36, 32)).sum(axis=0) % 2 * 4095).astype(np.uint16)
    _replace(folder, "yes", [checks, np.zeros((36, 32), np.uint16)])


def no_image_that_can_be_read(folder: Path) -> None:
    _replace(folder, "yes", _noise(1))
    path = folder / "dicom" / "007" / "0.dcm"
    path.write_bytes(path.read_bytes()[:-300])


def a_label_that_is_none(folder: Path) -> None:
    _replace(folder, "perhaps", _noise(1))


SWAPS = [
    one_image,
    thirty_images,
    the_other_class,
    extreme_pixels,
]


@pytest.fixture(scope="module")
def before(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[object]]:
    out = tmp_path_factory.mktemp("before")
    studies = {"masked": MASKED, "plain": PLAIN}
    return functools.cache(lambda how: marking(run(studies[how], sites, out / how)))


@pytest.mark.parametrize("how", ["masked", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "swap", [SWAPS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in SWAPS[1:])]
)
def test_one_patient_for_another_changes_nothing_that_shows(
    sites: Path,
    tmp_path: Path,
    before: Callable[[str], list[object]],
    swap: Callable[[Path], None],
    how: str,
) -> None:
    shutil.copytree(sites, tmp_path / "sites")
    swap(tmp_path / "sites" / "birke")
    asked = MASKED if how == "masked" else PLAIN
    after = marking(run(asked, tmp_path / "sites", tmp_path / "out"))
    assert len(after) == len(before(how))
    for one, other in zip(after, before(how), strict=True):
        assert one == other


def test_data_that_cannot_serve_cost_the_steward_s_word_before_anything_is_trained(
    sites: Path, tmp_path: Path
) -> None:
    """The one bit that is not charged, see docs/privacy-sharp-edges.md; it has no finer grain."""
    words = []
    for number, swap in enumerate([no_image_that_can_be_read, a_label_that_is_none]):
        shutil.copytree(sites, tmp_path / f"sites{number}")
        swap(tmp_path / f"sites{number}" / "birke")
        tap, out = Tap(), tmp_path / f"out{number}"
        simulation = Simulation(PLAIN, tmp_path / f"sites{number}", out)
        with pytest.raises(RunError, match="birke: the study is not approved there yet"):
            run_simulation(simulation, client_app=tap)
        assert {kind for _, kind, _, _ in tap.seen} == {"query.prepare"}
        require_listed(tap)
        words.append(marking(tap))
        assert charges(out, "birke") == []
    # What was wrong with the patient does not show.
    assert words[0] == words[1]


# Only listed fields, only values on the grid.


@pytest.fixture(scope="module")
def tapped(
    sites: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tap, list[NDArray[np.float64]], list[NDArray[np.uint32]]]:
    """A masked run: its messages, every privatised gradient, and every vector before its mask."""
    gradients: list[NDArray[np.float64]] = []
    encoded: list[NDArray[np.uint32]] = []
    honest_attach, honest_encode = (
        PatientDPOptimizer.attach_step_hook,
        participant_epoch.encode_into,
    )

    def attach(self: PatientDPOptimizer, hook: Callable[[Any], None]) -> None:
        def seen(optimizer: PatientDPOptimizer) -> None:
            flat = torch.cat([parameter.grad.reshape(-1) for parameter in optimizer.params])
            gradients.append(flat.double().numpy())
            hook(optimizer)

        honest_attach(self, seen)

    def encode(out: NDArray[np.uint32], values: NDArray[Any], **terms: Any) -> None:
        honest_encode(out, values, **terms)
        units = np.rint(np.asarray(values, np.float64) * terms["weight"] * terms["scale"])
        limit = np.rint(terms["clip"] * terms["weight"] * terms["scale"])
        assert np.array_equal(out.view(np.int32), np.clip(units, -limit, limit))
        encoded.append(out.copy())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PatientDPOptimizer, "attach_step_hook", attach)
        patch.setattr(participant_epoch, "encode_into", encode)
        tap = run(MASKED, sites, tmp_path_factory.mktemp("tapped") / "out")
    return tap, gradients, encoded


Tapped = tuple[Tap, list[NDArray[np.float64]], list[NDArray[np.uint32]]]


def require_listed(tap: Tap) -> set[str]:
    kinds = set()
    for name, _, _, records in tap.seen:
        head = records["cloister"]
        assert isinstance(head, ConfigRecord)
        kind = str(head["kind"])
        kinds.add(kind)
        scalars, arrays = LEAVES[kind]
        assert set(head) == EVERY | scalars
        assert head["site"] == name
        assert set(records) == {"cloister"} | ({"arrays"} if arrays else set())
        if arrays:
            assert set(records["arrays"]) == arrays
        if kind == "refusal":
            assert head["reason"] in set(Refused)
    for _, part in tap.parts():
        assert {field.name for field in fields(part)} == PROTOCOL[part.NAME]
    return kinds


def test_only_listed_fields_leave(tapped: Tapped, sites: Path, tmp_path: Path) -> None:
    assert require_listed(tapped[0]) == {"prepared", "exchanged"}
    assert {part.NAME for _, part in tapped[0].parts()} == {
        "advertise",
        "share",
        "mask",
        "unmask",
    }
    assert require_listed(run(PLAIN, sites, tmp_path / "plain")) == {"prepared", "update"}


def test_only_listed_fields_leave_a_site_that_refuses(sites: Path, tmp_path: Path) -> None:
    shutil.copytree(sites, tmp_path / "sites")
    (tmp_path / "sites" / "dorn" / "site.toml").write_text(
        '[site]\nname = "dorn"\n[policy]\npatients_at_most = 1000\nmax_epsilon_study = 1.0\n'
    )
    tap = Tap()
    with pytest.raises(RunError, match="dorn: its policy does not allow"):
        run_simulation(Simulation(MASKED, tmp_path / "sites", tmp_path / "out"), client_app=tap)
    assert "refusal" in require_listed(tap)


def test_all_values_are_on_the_grid(tapped: Tapped) -> None:
    tap, gradients, encoded = tapped
    assert len(gradients) == len(NAMES) * MASKED.training.total_steps
    # Clip 1 and divisor 8 are powers of two, so the noised sum can be read off to the unit.
    for gradient in gradients:
        units = gradient * MASKED.training.expected_batch * 2.0**30
        assert np.array_equal(units, np.rint(units))
        assert np.abs(units).max() > 2**20
    vectors = [part.vector for _, part in tap.parts() if isinstance(part, Masked)]
    assert len(vectors) == len(encoded) == len(NAMES) * MASKED.training.rounds
    for vector, bare in zip(vectors, encoded, strict=True):
        sent = np.frombuffer(vector, "<u4")
        assert sent.size == bare.size == gradients[0].size
        assert not (sent == bare).any()
        # A mask is uniform: bare values are small, and what leaves fills the range.
        assert np.abs(bare.view(np.int32).astype(np.int64)).max() < 2**30
        assert np.abs(np.mean(sent / 2.0**32) - 0.5) < 5 / np.sqrt(12 * sent.size)
