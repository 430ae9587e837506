"""A study and the hash of its initial model: drawn from the seed, written, kept and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister_fl import study as studies_api
from cloister_fl.cli.study_commands import app
from cloister_fl.errors import InitialModelUnfit, OutputInTheWay
from cloister_fl.networks import flat_parameters
from cloister_fl.protocol import sessions
from cloister_fl.study.binding import require_bound, write_initial_model
from cloister_fl.study.file import load_study, parse_study
from cloister_fl.study.initial_model import bind, bound, digest_of
from cloister_fl.study.study_network import build_for
from support import studies
from support.commands import invoke

PLAIN = studies.study(network={"arguments": {"width": 4}})
TEXT = studies.study_text(network={"arguments": {"width": 4}})


def test_the_hash_is_that_of_a_round_s_session() -> None:
    """So a site compares it without hashing the model twice."""
    model = flat_parameters.flatten(build_for(PLAIN))
    session = sessions.update_session(PLAIN, ["a"], round_number=1, attempt=0, model=model)
    assert bind(PLAIN).training.initial_model == digest_of(model) == session.model.hex()


def test_it_follows_from_seed_and_network_and_from_nothing_else() -> None:
    held = bind(PLAIN).training.initial_model
    others = [
        studies.study(network={"arguments": {"width": 8}}),
        studies_api.replace(PLAIN, training={"seed": 1}),
    ]
    assert all(bind(other).training.initial_model != held for other in others)
    alike = studies_api.replace(PLAIN, privacy={"epsilon": 1.0}, study={"name": "other"})
    assert bind(alike).training.initial_model == held
    assert bind(bind(PLAIN)) == bind(PLAIN)
    assert bind(PLAIN).digest != PLAIN.digest


def test_a_study_bound_to_another_model_is_refused() -> None:
    assert bound(PLAIN) == bound(bind(PLAIN)) == studies_api.bind(PLAIN)
    with pytest.raises(InitialModelUnfit, match="not the one whose hash"):
        bound(PLAIN.bound_to("0" * 64))
    with pytest.raises(InitialModelUnfit, match="does not carry"):
        require_bound(PLAIN)


def test_a_changed_study_keeps_the_hash_only_where_it_cannot_differ() -> None:
    made = bind(PLAIN)
    assert studies_api.replace(made, privacy={"epsilon": 1.0}).training.initial_model
    assert not studies_api.replace(made, training={"seed": 1}).training.initial_model
    assert not studies_api.replace(made, network={"arguments": {"width": 8}}).training.initial_model
    again = studies_api.replace(made, training={"initial_model": "1" * 64})
    assert again.training.initial_model == "1" * 64


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT + "\n[training]\nrounds = 3 # few\nseed = 4\n",
        TEXT + f'\n[training]\ninitial_model = "{"0" * 64}" # old\nseed = 4\n',
        TEXT.rstrip("\n"),
        TEXT.replace("\n", "\r\n"),
    ],
    ids=["no table", "table", "old hash", "no last line", "Windows"],
)
def test_the_hash_is_written_and_all_else_of_the_file_stays(tmp_path: Path, text: str) -> None:
    file = tmp_path / "study.toml"
    file.write_bytes(text.encode())
    write_initial_model(file, bind(parse_study(text)))
    assert load_study(file) == bind(parse_study(text))
    kept = [line for line in text.splitlines() if line and "initial_model" not in line]
    assert [line for line in file.read_text().splitlines() if line in kept] == kept
    write_initial_model(file, load_study(file))
    assert load_study(file) == bind(parse_study(text))


def test_a_file_without_a_place_for_it_is_left_as_it_is(tmp_path: Path) -> None:
    file, text = tmp_path / "study.toml", "training = { rounds = 3 }\n\n" + TEXT
    file.write_text(text)
    with pytest.raises(OutputInTheWay, match="no place"):
        write_initial_model(file, bind(parse_study(text)))
    assert file.read_text() == text


def test_bind_comes_before_sign(tmp_path: Path) -> None:
    """A signature under a study that is bound later would be under another study."""
    file, key = tmp_path / "study.toml", tmp_path / "key.pem"
    file.write_text(TEXT)
    invoke(app, "key", key)
    with pytest.raises(InitialModelUnfit, match="cloister study bind"):
        invoke(app, "sign", file, "--key", key)
    assert "from seed 0" in invoke(app, "check", file).output
    said = invoke(app, "bind", file).output
    assert bind(PLAIN).training.initial_model in said
    assert "Signed" in invoke(app, "sign", file, "--key", key).output
