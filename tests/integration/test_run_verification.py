"""`cloister verify` of a run: each thing that can be changed in its folder is found, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cloister_fl.cli.main import build
from cloister_fl.errors import CloisterError, FileUnreadable, RunUnverified
from cloister_fl.model_file import save_model
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.protocol import sessions
from cloister_fl.secagg import ServerEpoch, SumRecord
from cloister_fl.secagg.messages.codec import Masked, Shares, Unmasked
from cloister_fl.server.results.run_verification import RunVerdict, verify_run
from cloister_fl.server.rounds import kept_sums
from cloister_fl.server.rounds.checkpoint import Checkpoints, Figures, RunState
from cloister_fl.server.rounds.kept_sums import KeptSums, why_not
from cloister_fl.server.rounds.run import advanced
from cloister_fl.server.rounds.strategies import OptimizerState
from cloister_fl.server.rounds.sum_check import norm_of
from cloister_fl.study.initial_model import bind
from cloister_fl.study.schema import Study
from cloister_fl.study.study_network import build_for
from support import studies
from support.errors import raises
from support.secagg import Federation

RUN = "ab" * 16
ROUNDS = 4
LOST = 2
"""A round that gave no sum."""
SHORT = 3
"""A round that one site drops out of."""


def _study() -> Study:
    tables: dict[str, studies.Table] = {
        "network": {"arguments": {"width": 4}},
        "input": {"size": 32},
        "training": {"rounds": ROUNDS},
        "aggregation": {"strategy": "fedadam", "server_learning_rate": 0.01, "ema": 0.5},
    }
    return bind(studies.study(**tables))


def _record(study: Study, state: RunState, number: int) -> tuple[SumRecord, np.ndarray, int]:
    """A round among sites in memory: the record, the mean, and how many sites are in it."""
    size = state.model.size
    clip = study.aggregation.clip
    federation = Federation(5, dimension=size, clip=clip, data_seed=number)
    federation.updates = {k: v * np.float32(1e-3 / clip) for k, v in federation.updates.items()}
    federation.policy = replace(federation.policy, study=bytes.fromhex(study.digest))
    federation.sites = {name: federation.make_site(name) for name in federation.names}
    terms = federation.terms(number, study=bytes.fromhex(study.digest), run=f"{RUN}/1", colluders=1)
    session = sessions.update_session(
        study, federation.names, round_number=number, attempt=0, model=state.model
    )
    server = ServerEpoch(terms, federation.roster, keep=True)
    federation.advertise(server)
    federation.share(server)
    federation.mask(server, session, absent=("site-02",) if number == SHORT else ())
    federation.consent(server)
    federation.unmask(server)
    mean = server.finish().mean()
    return SumRecord.of(server, session), mean, len(server.survivors)


@pytest.fixture(scope="module")
def study() -> Study:
    return _study()


@pytest.fixture(scope="module")
def made(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four rounds."""
    out = tmp_path_factory.mktemp("made") / "run"
    checkpoints = Checkpoints(out / "checkpoint")
    model = flatten(build_for(study))
    federation = Federation(5)
    figures: tuple[Figures, ...] = (Figures(0, 0, 0.0, 0.0),)
    optimizer = OptimizerState.fresh(model.size, study.aggregation)
    state = RunState(RUN, 0, model, optimizer, invited=federation.names)
    checkpoints.sums.begin(model)
    checkpoints.sums.go_on(federation.roster, ())
    for number in range(1, ROUNDS + 1):
        if number == LOST:
            state = replace(state, completed=number, lost=(number,))
            continue
        record, mean, sites = _record(study, state, number)
        checkpoints.sums.keep(number, record)
        state = advanced(state, number, mean, study.aggregation)
        figures = (*figures, Figures(number, sites, 1.0, norm_of(mean), epsilon=1.0))
    state = replace(state, figures=figures, started=dict.fromkeys(federation.names, ROUNDS))
    checkpoints.save(study, state)
    save_model(out / "model.safetensors", study, state.released, {})
    (out / "summary.json").write_text("{}")
    return out


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def _file(run: Path, number: int) -> Path:
    return run / "checkpoint" / "sums" / f"round-{number:06d}"


def _changed(run: Path, number: int, change: Callable[[SumRecord], SumRecord]) -> RunVerdict:
    path = _file(run, number)
    path.write_bytes(change(SumRecord.decode(path.read_bytes())).encode())
    return verify_run(run)


def _with(
    record: SumRecord, kind: type, change: Callable[..., object], index: int = 0
) -> SumRecord:
    """The record with one message of a kind changed."""
    place = [i for i, part in enumerate(record.messages) if isinstance(part, kind)][index]
    parts = list(record.messages)
    parts[place] = change(parts[place])  # type: ignore[call-overload]
    return replace(record, messages=tuple(parts))


def test_a_run_as_it_was_has_no_finding(made: Path) -> None:
    verdict = verify_run(made)
    assert verdict.findings == ()
    assert (verdict.rounds, verdict.sums, verdict.lost) == (4, 3, (LOST,))
    assert list(verdict.sites) == [f"site-0{n}" for n in range(1, 6)]
    assert verdict.has_model_file


def test_the_record_of_a_round_is_private_and_as_large_as_was_reckoned(made: Path) -> None:
    folder = made / "checkpoint" / "sums"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    size = (folder / "initial").stat().st_size // 4
    assert _file(made, 1).stat().st_size <= kept_sums.round_bytes(5, size)


def test_a_changed_vector_is_found(run: Path) -> None:
    def change(part: Masked) -> Masked:
        vector = bytearray(part.vector)
        vector[40] ^= 1
        return replace(part, vector=bytes(vector))

    verdict = _changed(run, 1, lambda record: _with(record, Masked, change))
    assert verdict.findings[0].startswith(
        "Round 1: The vector in the name of site-01 is not signed"
    )
    assert verdict.sums == 2


def test_a_signature_of_another_site_is_found(run: Path) -> None:
    def swap(record: SumRecord) -> SumRecord:
        other = [part for part in record.messages if isinstance(part, Masked)][1]
        return _with(record, Masked, lambda part: replace(part, signature=other.signature))

    assert "site-01 is not signed" in _changed(run, 1, swap).findings[0]


def test_a_site_that_was_left_out_of_the_sum_is_found(run: Path) -> None:
    def drop(record: SumRecord) -> SumRecord:
        gone = [part for part in record.messages if isinstance(part, Masked)][-1]
        return replace(record, messages=tuple(m for m in record.messages if m is not gone))

    # The others' consents are to the sum with it.
    assert _changed(run, 1, drop).findings[0].startswith("Round 1: ")
    assert verify_run(run).sums == 2


def test_a_changed_share_is_found(run: Path) -> None:
    def change(part: Unmasked) -> Unmasked:
        (site, share), *rest = part.b_shares
        return replace(part, b_shares=((site, bytes(len(share))), *rest))

    verdict = _changed(run, SHORT, lambda record: _with(record, Unmasked, change))
    assert verdict.findings[0].startswith("Round 3: The shares in the name of site-01 are not")


def test_boxes_of_another_round_are_found(run: Path) -> None:
    other = SumRecord.decode(_file(run, 4).read_bytes())
    shares = next(part for part in other.messages if isinstance(part, Shares))
    verdict = _changed(run, 1, lambda record: _with(record, Shares, lambda _: shares))
    assert verdict.findings[0].startswith("Round 1: ")


def test_a_round_that_was_dropped_is_found(run: Path) -> None:
    _file(run, 3).unlink()
    assert verify_run(run).findings[0].startswith("Round 3: round-000003 cannot be read.")


def test_a_round_in_the_place_of_another_is_found(run: Path) -> None:
    shutil.copy(_file(run, 1), _file(run, 3))
    verdict = verify_run(run)
    assert verdict.findings[0].startswith("Round 3: the model that the sites were sent is not")
    assert any("another session" in found for found in verdict.findings)


def test_a_record_of_a_lost_round_is_found(run: Path) -> None:
    shutil.copy(_file(run, 1), _file(run, LOST))
    findings = verify_run(run).findings
    assert findings == ("Round 2 counts as lost, and there is a record of its sum.",)


def test_another_step_than_the_studys_is_found_in_the_next_round(
    study: Study, made: Path, run: Path
) -> None:
    """What the sites signed in round 4 names the model that round 3 gave them."""
    state, _ = Checkpoints(run / "checkpoint").load(study)
    record, _, _ = _record(study, state, 4)
    Checkpoints(run / "checkpoint").sums.keep(4, record)
    verdict = verify_run(run)
    assert verdict.findings[0].startswith("Round 4: the model that the sites were sent is not")
    assert verdict.sums == 3


@pytest.mark.parametrize(
    ("field", "name"), [("model", "model"), ("average", "average of the models")]
)
def test_a_changed_bit_of_the_last_model_is_found(
    study: Study, run: Path, field: str, name: str
) -> None:
    checkpoints = Checkpoints(run / "checkpoint")
    state, _ = checkpoints.load(study)
    vector = getattr(state, field).copy()
    vector[5] = np.nextafter(vector[5], np.float32(1))
    checkpoints.save(study, replace(state, **{field: vector}))
    findings = verify_run(run).findings
    assert findings[0] == (
        f"The {name} in the state is not what the sums and the server's steps give."
    )
    assert ("model.safetensors is not the model to deliver." in findings) is (field == "average")


def test_figures_of_another_sum_are_found(study: Study, run: Path) -> None:
    checkpoints = Checkpoints(run / "checkpoint")
    state, _ = checkpoints.load(study)
    last = replace(state.figures[-1], update_norm=state.figures[-1].update_norm * 1.01)
    checkpoints.save(study, replace(state, figures=(*state.figures[:-1], last)))
    assert verify_run(run).findings == ("Round 4: the state's figures are of another sum.",)


def test_a_sum_that_was_discarded_for_no_reason_is_found(study: Study, run: Path) -> None:
    checkpoints = Checkpoints(run / "checkpoint")
    state, _ = checkpoints.load(study)
    checkpoints.save(study, replace(state, lost=(LOST, 4), discarded=(4,)))
    assert verify_run(run).findings[0] == (
        "Round 4: its sum was discarded, against the bound of an honest sum."
    )


def test_another_initial_model_is_found(run: Path) -> None:
    path = run / "checkpoint" / "sums" / "initial"
    path.write_bytes(bytes(path.stat().st_size))
    assert verify_run(run).findings[0] == (
        "The initial model is not the one whose hash the study carries."
    )


def test_a_changed_model_file_is_found(run: Path) -> None:
    path = run / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    assert verify_run(run).findings == ("model.safetensors is not the model to deliver.",)
    # While a run goes on it is the model of an earlier round.
    (run / "summary.json").unlink()
    verdict = verify_run(run)
    assert verdict.findings == ()
    assert not verdict.has_model_file


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_record_that_was_cut_short_is_a_finding(run: Path, keep: int) -> None:
    path = _file(run, 1)
    path.write_bytes(path.read_bytes()[:keep])
    assert verify_run(run).findings[0].startswith("Round 1: ")


def test_a_record_of_any_damaged_byte_is_a_finding(run: Path) -> None:
    path = _file(run, 4)
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 12):
        data = bytearray(whole)
        data[place] ^= 0xFF
        path.write_bytes(bytes(data))
        assert verify_run(run).findings[0].startswith("Round 4: "), place


def test_a_record_that_is_too_large_is_not_read(run: Path) -> None:
    with _file(run, 1).open("r+b") as file:
        file.truncate(1 << 40)
    assert verify_run(run).findings[0].startswith("Round 1: round-000001 is larger than it can be.")


def test_a_state_that_is_too_large_or_damaged_is_a_numbered_error(run: Path) -> None:
    path = run / "checkpoint" / "state.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[:100], whole[:-1], b"\xff" * 64):
        path.write_bytes(data)
        with raises(FileUnreadable, match="cannot be read"):
            verify_run(run)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with raises(FileUnreadable, match="is not a file of a checkpoint"):
        verify_run(run)


def test_what_a_crash_left_is_removed_before_the_run_goes_on(run: Path) -> None:
    sums = KeptSums(run / "checkpoint" / "sums")
    left = _file(run, 4).with_name(f".{'a' * 16}.tmp")
    left.write_bytes(b"half a record")
    # Round 4 was sent, its sum was there, and the state was not saved: it counts as lost.
    sums.go_on(Federation(5).roster, (1, 3))
    assert not left.exists()
    assert [sums.has(number) for number in range(1, 5)] == [True, False, True, False]


def test_sums_are_kept_with_privacy_and_where_they_fit_alone(study: Study) -> None:
    assert why_not(study, 5, 1000) == ""
    assert why_not(study, 5, 20_000_000) == "1.7 GB are more than 1 GB"
    once = studies.study(training={"rounds": 1})
    assert why_not(once, 5, 12_000_000) == ""
    assert why_not(once, 5, 13_000_000) == "260 MB a round are more than 250 MB"
    off = studies.study(privacy="enabled = false")
    assert why_not(off, 5, 1000) == "privacy is off"
    plain = studies.study(aggregation={"secure": False})
    assert why_not(plain, 5, 1000) == "secure aggregation is off"


def test_a_failed_sum_leaves_no_record(study: Study) -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster, keep=True)
    federation.advertise(server)
    federation.share(server)
    federation.mask(server, federation.session())
    federation.consent(server)
    federation.unmask(server)
    with pytest.raises(CloisterError, match="collects unmasking, not done"):
        SumRecord.of(server, federation.session())


def test_the_command_says_what_it_found(run: Path) -> None:
    command = CliRunner()
    found = command.invoke(build(), ["verify", str(run)])
    assert found.exit_code == 0
    assert "4 rounds, 3 sums computed again" in found.output
    assert "the model file is that model" in found.output
    _file(run, 1).unlink()
    found = command.invoke(build(), ["verify", "--json", str(run)])
    assert isinstance(found.exception, CloisterError)
    assert found.exception.code == RunUnverified.code
    assert found.exception.exit_status == 4
    told = json.loads(found.stdout)
    assert (told["holds"], told["sums"], len(told["findings"])) == (False, 2, 2)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with raises(FileUnreadable, match="is not the folder of a run"):
        verify_run(tmp_path)
