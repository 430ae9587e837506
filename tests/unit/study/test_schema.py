"""The study: judged whole, hashed by meaning."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cloister_fl.errors import StudyInvalid
from cloister_fl.study.file import load_study, parse_study
from cloister_fl.study.schema import Network, Study, study_from_canonical
from cloister_fl.system.text import is_plain
from cloister_fl.tasks import read_target
from cloister_fl.tasks.segmentation import Segmentation
from support.federations import with_engine

TEN_LINES = """\
[study]
name = "nodule"
question = "Does the radiograph show a pulmonary nodule?"
[target]
column = "finding"
classes = ["normal", "nodule"]
[training]
rounds = 20
[privacy]
epsilon = 3.0
"""
TEN_LINES_HASH = "f3e4451b19aa2d52d703838ae03c3cfb5ff1458465c08e611d758f11542fdada"
"""Pinned: if it changes, every approval that a steward ever gave is void."""

EXAMPLE = files("cloister_fl.study").joinpath("example_study.toml").read_text("utf-8")

Values = dict[str, Any]


def faults(text: str) -> list[tuple[int, str]]:
    with pytest.raises(StudyInvalid) as caught:
        parse_study(text)
    return [(fault.line, fault.key) for fault in caught.value.faults]


def with_lines(*lines: str) -> str:
    """A valid start, closed by ``lines``: the first of them is line 7."""
    return "\n".join([*TEN_LINES.splitlines()[:6], *lines, ""])


# Valid studies


@pytest.mark.parametrize("privacy", [[], ["[privacy]", "enabled = false"]])
def test_an_engine_that_was_taken_out_is_refused_with_its_line_and_a_hint(
    privacy: list[str],
) -> None:
    with pytest.raises(StudyInvalid) as caught:
        parse_study(with_lines("[training]", "rounds = 3", 'engine = "book-keeping"', *privacy))
    (fault,) = caught.value.faults
    assert (fault.line, fault.key) == (9, "training.engine")
    assert fault.message == (
        "'book-keeping' was taken out: one patient can move its sum of clipped gradients by many "
        "times privacy.clipping_norm, so no study's epsilon holds."
    )
    assert fault.hint == 'Write engine = "patients" in [training].'


def test_an_engine_that_was_taken_out_is_told_beside_other_faults() -> None:
    given = ["[training]", 'engine = "book-keeping"', "rounds = 0", "[privacy]", "epsilon = -1.0"]
    assert faults(with_lines(*given)) == [
        (8, "training.engine"),
        (9, "training.rounds"),
        (11, "privacy.epsilon"),
    ]


def test_a_study_with_book_keeping_that_was_trained_can_still_be_read() -> None:
    old = with_engine(parse_study(TEN_LINES), "book-keeping")
    assert study_from_canonical(old.canonical()) == old


def test_ten_lines_are_a_study() -> None:
    study = parse_study(TEN_LINES)
    assert len(TEN_LINES.splitlines()) == 10
    assert study.task.outputs == 2
    assert study.privacy.enabled
    assert (study.training.steps_per_round, study.training.total_steps) == (1, 20)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ([], 1),
        (["steps = 7"], 7),
        (["epochs = 1.0", "sampling_rate = 0.02"], 50),
        (["epochs = 0.1", "sampling_rate = 0.1"], 1),
        (["epochs = 0.3", "sampling_rate = 0.1"], 3),
        (["epochs = 0.5"], 1),
    ],
)
def test_steps_of_a_round(given: list[str], steps: int) -> None:
    training = parse_study(with_lines("[training]", "rounds = 3", *given)).training
    assert (training.steps_per_round, training.total_steps) == (steps, 3 * steps)


def test_load_study_names_the_file_and_not_its_folder(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(TEN_LINES, encoding="utf-8-sig", newline="\r\n")
    bad.write_text("")
    assert load_study(good) == parse_study(TEN_LINES)
    with pytest.raises(StudyInvalid, match=r"bad\.toml has 2 faults") as caught:
        load_study(bad)
    assert str(tmp_path) not in str(caught.value)


VOLUMES = [
    "[input]",
    'modalities = ["CT"]',
    "dimensions = 3",
    "depth = 32",
    "spacing = 2.5",
]


def test_a_study_of_volumes() -> None:
    study = parse_study(with_lines(*VOLUMES, "[network]", 'name = "small-cnn-3d"'))
    assert (study.input.dimensions, study.input.depth, study.input.spacing) == (3, 32, 2.5)
    held = json.loads(study.canonical())["input"]
    assert (held["dimensions"], held["depth"], held["spacing"]) == (3, 32, 2.5)
    assert study_from_canonical(study.canonical()) == study
    other = parse_study(
        with_lines(*VOLUMES[:-1], "spacing = 2.0", "[network]", 'name = "small-cnn-3d"')
    )
    assert other.digest != study.digest
    assert other.update_digest != study.update_digest


def test_an_open_studys_updates_do_not_depend_on_what_does_not_train() -> None:
    lines = ["[input]", 'modalities = ["CT"]', 'windowing = "fixed"', "window = [40.0, 400.0]"]
    flat = parse_study(with_lines(*lines))
    assert parse_study(with_lines(*lines, "dimensions = 2")) == flat
    assert flat.update_digest.hex() == flat.digest
    open_study = parse_study(with_lines(*lines, "[privacy]", "enabled = false"))
    assert open_study.update_digest.hex() != open_study.digest


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # Without a depth or a spacing; with one where images are flat.
        ([*VOLUMES[:3], "spacing = 2.5"], ["input.depth"]),
        (VOLUMES[:4], ["input.spacing"]),
        (["[input]", "depth = 32"], ["input.depth"]),
        (["[input]", "dimensions = 2", "spacing = 1.0"], ["input.spacing"]),
        ([*VOLUMES[:3], "depth = 3", "spacing = 2.5"], ["input.depth"]),
        ([*VOLUMES[:3], "depth = 257", "spacing = 0.0"], ["input.depth", "input.spacing"]),
        (["[input]", "dimensions = 4"], ["input.dimensions"]),
        (["[input]", *VOLUMES[2:]], ["input.modalities"]),
        (["[input]", 'modalities = ["CT", "DX"]', *VOLUMES[2:]], ["input.modalities"]),
        ([*VOLUMES, "size = 1024"], ["input.depth"]),
    ],
)
def test_faults_of_volumes(lines: list[str], expected: list[str]) -> None:
    # A fault of the input is no reason to find one in the network.
    told = faults(with_lines(*lines, "[network]", 'name = "small-cnn-3d"'))
    assert [key for _, key in told] == expected


@pytest.mark.parametrize(
    "lines",
    [
        VOLUMES,
        [*VOLUMES, "[network]", 'name = "small-cnn"'],
        [*VOLUMES, "[network]", 'name = "filter-bank"'],
        ["[network]", 'name = "small-cnn-3d"'],
    ],
)
def test_a_network_must_have_the_dimensions_of_the_input(lines: list[str]) -> None:
    with pytest.raises(StudyInvalid, match="dimensions, and input") as caught:
        parse_study(with_lines(*lines))
    assert [fault.key for fault in caught.value.faults] == ["network.name"]


# Faults


def test_five_faults_are_told_at_once() -> None:
    text = """\
[study]
name = "No Dule"
question = "Does it?"

[target]
column = "finding"
classes = ["normal"]

[training]
round = 20
steps = 0

[privacy]
epsilon = -1.0
"""
    with pytest.raises(StudyInvalid) as caught:
        parse_study(text)
    error = caught.value
    assert error.code == "CLO-101"
    assert error.exit_status == 2
    assert [(fault.line, fault.key) for fault in error.faults] == [
        (2, "study.name"),
        (7, "target.classes"),
        (10, "training.round"),
        (11, "training.steps"),
        (14, "privacy.epsilon"),
    ]
    message = str(error)
    assert message.startswith("CLO-101: study.toml has 5 faults:\n")
    assert "line 10: training.round: is not a known key. Did you mean 'rounds'?" in message
    assert "line 14: privacy.epsilon: must be above 0. It says -1.0." in message


@pytest.mark.parametrize(
    ("lines", "line", "key"),
    [
        (["[input]", 'windowing = "fixed"'], 7, "input.window"),
        (["[input]", "window = [40.0, 400.0]"], 8, "input.window"),
        (["[input]", 'windowing = "fixed"', "window = [40.0, 0.0]"], 9, "input.window"),
        (["[input]", "percentiles = [99.0, 1.0]"], 8, "input.percentiles"),
        (["[input]", "percentiles = [1.0, 101.0]"], 8, "input.percentiles"),
        (["[input]", 'modalities = ["XX"]'], 8, "input.modalities.0"),
        (["[input]", "modalities = []"], 8, "input.modalities"),
        (["[input]", "size = 8"], 8, "input.size"),
        (["[input]", "size = 128.0"], 8, "input.size"),
        (["[training]", "steps = 2", "epochs = 1.0"], 9, "training.epochs"),
        (["[training]", "sampling_rate = 1.5"], 8, "training.sampling_rate"),
        (["[training]", "momentum = 1.0"], 8, "training.momentum"),
        (["[training]", "augment = 1"], 8, "training.augment"),
        (["[privacy]", "epsilon = nan"], 8, "privacy.epsilon"),
        (["[privacy]", "epsilon = inf"], 8, "privacy.epsilon"),
        (["[privacy]", 'unit = "image"'], 8, "privacy.unit"),
        (["[privacy]", "delta = 0.5"], 8, "privacy.delta"),
        (["[aggregation]", 'strategy = "fedprox"'], 7, "aggregation.proximal_mu"),
        (["[aggregation]", "proximal_mu = 0.1"], 8, "aggregation.proximal_mu"),
        (["[aggregation.weights]", "a = 0"], 8, "aggregation.weights.a"),
        (["[aggregation.weights]", '"A b" = 1'], 8, "aggregation.weights.A b"),
        (["[evaluation]", "site_fraction = 1.0"], 8, "evaluation.site_fraction"),
        (["[evaluation]", "release_epsilon = 3.0"], 8, "evaluation.release_epsilon"),
        (
            ["[evaluation]", "release_epsilon = 1.0", "site_fraction = 0.0"],
            8,
            "evaluation.release_epsilon",
        ),
        (
            ["[evaluation]", "release_epsilon = 1.0", "[privacy]", "enabled = false"],
            8,
            "evaluation.release_epsilon",
        ),
        (["[network]", "arguments = { x = [1] }"], 8, "network.arguments.x"),
        (["[code]", 'run = "x"'], 7, "code"),
    ],
)
def test_a_faulty_key_is_named_with_its_line(lines: list[str], line: int, key: str) -> None:
    assert faults(with_lines(*lines)) == [(line, key)]


def test_a_class_named_twice_is_a_fault() -> None:
    text = TEN_LINES.replace('"nodule"]', '"normal"]')
    assert faults(text) == [(6, "target.classes")]


def test_missing_tables_are_told_without_a_line() -> None:
    assert faults("") == [(0, "study"), (0, "target")]
    assert faults("[study]\n[target]\n") == [
        (1, "study.name"),
        (1, "study.question"),
        (2, "target.classes"),
        (2, "target.column"),
    ]


# The hash


def test_the_unit_of_labels_leaves_the_hash_of_studies_that_do_not_name_it() -> None:
    said = TEN_LINES.replace("[target]", '[target]\nunit = "patient"')
    assert parse_study(said).digest == TEN_LINES_HASH
    hashes = {TEN_LINES_HASH}
    for unit in ("examination", "image"):
        asked = parse_study(said.replace('"patient"', f'"{unit}"'))
        assert asked.task.unit == unit
        assert f'"unit":"{unit}"' in asked.canonical()
        assert study_from_canonical(asked.canonical()) == asked
        hashes.add(asked.digest)
    assert len(hashes) == 3
    assert faults(said.replace('"patient"', '"lesion"'))[0][1] == "target.unit"
    volumes = '[input]\nmodalities = ["CT"]\ndimensions = 3\ndepth = 8\nspacing = 5.0\n'
    volumes += '[network]\nname = "small-cnn-3d"\n'
    assert parse_study(volumes + said.replace('"patient"', '"examination"'))
    assert faults(volumes + said.replace('"patient"', '"image"'))[0][1] == "target.unit"


def test_the_hash_of_the_ten_lines_is_pinned() -> None:
    assert parse_study(TEN_LINES).digest == TEN_LINES_HASH


def test_a_study_with_a_release_has_another_hash() -> None:
    text = f"{TEN_LINES}[evaluation]\nrelease_epsilon = "
    assert parse_study(f"{text}0\n").digest == TEN_LINES_HASH
    asked = parse_study(f"{text}0.5\n")
    assert asked.digest != TEN_LINES_HASH
    assert asked.releases
    assert not parse_study(TEN_LINES).releases
    assert study_from_canonical(asked.canonical()) == asked


def test_spelling_does_not_change_the_hash() -> None:
    study = parse_study(TEN_LINES)
    everything = json.loads(study.canonical())
    reordered = dict(reversed([(k, dict(reversed(v.items()))) for k, v in everything.items()]))
    spellings = [
        "# a comment\n" + TEN_LINES.replace(" = ", "   =  "),
        TEN_LINES.replace("\n", "\r\n"),
        "privacy.epsilon = 3.0\n" + TEN_LINES.partition("[privacy]")[0],
        TEN_LINES.replace("3.0", "3"),
        TEN_LINES.replace("3.0", "0.3e1"),
        TEN_LINES.replace('"nodule"\n', "'nodule'\n"),
        TEN_LINES.replace("rounds = 20", "rounds = 0x14"),
        tomli_w.dumps(_without_none(everything)),
        tomli_w.dumps(_without_none(reordered)),
        "[evaluation]\n[input]\n" + TEN_LINES,
    ]
    for text in spellings:
        assert parse_study(text).digest == study.digest, text


def test_saying_a_default_does_not_change_the_hash() -> None:
    plain = parse_study(with_lines())
    for table, values in json.loads(plain.canonical()).items():
        for key, value in values.items():
            if table in ("study", "target") or value is None:
                continue
            said = with_lines(tomli_w.dumps({table: {key: value}}))
            assert parse_study(said).digest == plain.digest, (table, key)


OTHER: dict[str, Any] = {
    "study.name": "other",
    "study.question": "Other?",
    "input.modalities": ["DX", "CR"],
    "input.size": 64,
    "input.windowing": "voi",
    "input.percentiles": [2.0, 99.0],
    "input.window": [40.0, 400.0],
    "input.dimensions": 3,
    "input.depth": 8,
    "input.spacing": 2.0,
    "target.kind": "segmentation",
    "target.column": "other",
    "target.classes": ["nodule", "normal"],
    "network.name": "resnet18",
    "network.arguments": {"width": 8},
    "training.rounds": 21,
    "training.steps": 2,
    "training.epochs": 2.0,
    "training.sampling_rate": 0.5,
    "training.expected_batch": 32.0,
    "training.images_per_patient": 2,
    "training.optimizer": "adam",
    "training.learning_rate": 0.1,
    "training.schedule": "cosine",
    "training.momentum": 0.9,
    "training.engine": "opacus",
    "training.augment": True,
    "training.seed": 1,
    "training.initial_model": "1" * 64,
    "privacy.enabled": False,
    "privacy.unit": None,  # one value only
    "privacy.epsilon": 2.0,
    "privacy.delta": 1e-6,
    "privacy.clipping_norm": 2.0,
    "aggregation.strategy": "fedadam",
    "aggregation.secure": False,
    "aggregation.min_sites": 3,
    "aggregation.colluders": 2,
    "aggregation.clip": 4.0,
    "aggregation.weights": {"site-a": 2.0},
    "aggregation.server_learning_rate": 0.5,
    "aggregation.beta1": 0.5,
    "aggregation.beta2": 0.5,
    "aggregation.tau": 0.5,
    "aggregation.ema": 0.9,
    "aggregation.proximal_mu": 0.5,
    "evaluation.every": 2,
    "evaluation.site_fraction": 0.3,
    "evaluation.release_epsilon": 1.0,
}
_VOLUME: Values = {"input.modalities": ["CT"], "network.name": "small-cnn-3d"}
ALONG: dict[str, Values] = {
    "input.dimensions": {**_VOLUME, "input.depth": 4, "input.spacing": 1.0},
    "input.depth": {**_VOLUME, "input.dimensions": 3, "input.spacing": 1.0},
    "input.spacing": {**_VOLUME, "input.dimensions": 3, "input.depth": 4},
    "target.kind": {
        "target.segment": "lungs",
        "target.column": None,
        "target.classes": None,
        "network.name": "unet",
    },
    "input.window": {"input.windowing": "fixed"},
    "training.epochs": {"training.steps": None},
    "aggregation.proximal_mu": {"aggregation.strategy": "fedprox"},
}
"""What must change too, for the other value to be valid."""


def test_every_key_is_tried() -> None:
    values = json.loads(parse_study(TEN_LINES).canonical())
    leaves = {f"{table}.{key}" for table, keys in values.items() for key in keys}
    assert leaves == set(OTHER)


def test_every_key_changes_the_hash() -> None:
    digests = {parse_study(TEN_LINES).digest}
    for count, (path, other) in enumerate(OTHER.items(), start=1):
        values = json.loads(parse_study(TEN_LINES).canonical())
        if other is None:
            digests.add(path)
            continue
        for key, value in {path: other, **ALONG.get(path, {})}.items():
            table, _, leaf = key.partition(".")
            values[table][leaf] = value
        digests.add(parse_study(tomli_w.dumps(_without_none(values))).digest)
        assert len(digests) == count + 1, path


def test_the_type_of_an_argument_is_part_of_its_meaning() -> None:
    plain = parse_study(TEN_LINES)
    digests = {
        plain.model_copy(update={"network": Network(arguments={"width": value})}).digest
        for value in (1, 1.0, True, "1")
    }
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ("[network]", 'name = "resnet50"'),
            {"name": "There is no network 'resnet50'. Did you mean"},
        ),
        (
            ("[network.arguments]", "widht = 8"),
            {"arguments.widht": "has no argument 'widht'. Did you mean 'width'?"},
        ),
        (("[network.arguments]", "width = 0"), {"arguments.width": "cannot be 0"}),
        (("[input]", "size = 16", "[network]", 'name = "densenet121"'), {"name": "too small"}),
        (
            (
                *("[input]", "size = 16", "[network]", 'name = "densenet121"'),
                *("[network.arguments]", "groups = 3", "depth = 1"),
            ),
            {
                "name": "too small",
                "arguments.groups": "cannot be 3. It is a whole number from",
                "arguments.depth": "has no argument 'depth'",
            },
        ),
        (
            ("[network]", 'name = "frozen-backbone"'),
            {
                "arguments.sha256": "needs the argument",
                "arguments.architecture": "needs the argument",
            },
        ),
    ],
)
def test_a_network_is_judged_with_the_rest(lines: tuple[str, ...], words: dict[str, str]) -> None:
    text = with_lines(*lines, "[privacy]", "epsilon = 0")
    with pytest.raises(StudyInvalid) as caught:
        parse_study(text)
    told = {fault.key: fault for fault in caught.value.faults}
    assert set(told) == {"privacy.epsilon", *(f"network.{key}" for key in words)}
    for key, said in words.items():
        fault = told[f"network.{key}"]
        assert said in fault.message
        assert key.rpartition(".")[2] in text.splitlines()[fault.line - 1] or "needs" in said


def test_a_study_from_elsewhere_may_name_a_network_that_is_not_here() -> None:
    """It keeps its hash; the site that has no such network says so."""
    other = parse_study(TEN_LINES).model_copy(update={"network": Network(name="of-tomorrow")})
    assert study_from_canonical(other.canonical()) == other


def _without_none(values: Values) -> Values:
    return {
        table: {key: value for key, value in keys.items() if value is not None}
        for table, keys in values.items()
    }


# The canonical form


def test_canonical_is_sorted_json_without_white_space() -> None:
    text = parse_study(TEN_LINES).canonical()
    values = json.loads(text)
    assert text == json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert text.isascii()


# Some letters are blank, too; what is refused is tested above.
_SEEN = st.characters(exclude_categories=("Cs", "Cc", "Cf", "Cn", "Co", "Zl", "Zp")).filter(
    is_plain
)
_ARGUMENTS = st.dictionaries(
    st.text(_SEEN, max_size=5),
    st.one_of(
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.text(_SEEN, max_size=5),
    ),
    max_size=4,
)


@given(
    _ARGUMENTS,
    st.floats(1e-12, 0.09),
    st.text(_SEEN, min_size=1),
)
@settings(max_examples=100, deadline=None)
def test_the_canonical_form_comes_back_the_same(
    arguments: Values, delta: float, question: str
) -> None:
    values = json.loads(parse_study(TEN_LINES).canonical())
    values["network"]["arguments"] = arguments
    values["privacy"]["delta"] = delta
    values["study"]["question"] = question
    study = Study.model_validate(values)
    again = study_from_canonical(study.canonical())
    assert again == study
    assert again.canonical() == study.canonical()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + " ",
        lambda text: text.replace(":", ": ", 1),
        lambda text: text.replace('"epsilon":3.0', '"epsilon":3'),
        lambda text: text.replace('"epsilon":3.0', '"epsilon":"3.0"'),
        lambda text: text.replace('"epsilon":3.0', '"epsilon":NaN'),
        lambda text: text.replace('"steps":1', '"steps":null'),
        lambda text: text.replace('"enabled":true,', ""),
        lambda text: text.replace('"enabled":true', '"enabled":1'),
        lambda text: text.replace('"enabled":true', '"code":"x","enabled":true'),
        lambda text: text.replace('"epsilon":3.0', '"epsilon":-3.0'),
        lambda text: text[:-1],
        lambda _: "",
        lambda _: "null",
        lambda _: "[]",
        lambda _: "[" * 100_000,
        lambda _: '"\ud800"',
    ],
)
def test_what_is_not_canonical_is_refused(change: Any) -> None:
    text = parse_study(TEN_LINES).canonical()
    assert change(text) != text
    with pytest.raises(StudyInvalid):
        study_from_canonical(change(text))


FORGED = (
    *("a\x1b[8mb", "a\nb", "a\0b", "a\u202eb", "a\u200bb", "a\rb", "a\x9bb", "a\u2028b"),
    *("a\u3164b", "a\u115fb", "a\u1160b", "a\uffa0b", "a\u2800b"),
)


@pytest.mark.parametrize("text", FORGED)
@pytest.mark.parametrize(
    "where",
    [
        ("study", "question"), ("target", "column"), ("target", "classes"),
        ("network", "arguments"), ("target", "segment"),
    ],
)  # fmt: skip
def test_nothing_in_a_study_can_steer_the_terminal_that_shows_it(
    where: tuple[str, str], text: str
) -> None:
    table, key = where
    plain = json.loads(parse_study(TEN_LINES).canonical())
    value: Any = {"classes": ["normal", text], "arguments": {"weights": text}}.get(key, text)
    if key == "segment":
        plain["target"] = {"kind": "segmentation"}
    plain[table][key] = value
    forged = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    with pytest.raises(StudyInvalid):
        study_from_canonical(forged)
    if key != "segment":  # which has one spelling: what separates words there is a space
        with pytest.raises(ValidationError):
            Study.model_validate(plain, strict=False)


def test_a_person_is_told_where_such_a_character_stands() -> None:
    text = TEN_LINES.replace('question = "', 'question = "\\u001b[8m')
    with pytest.raises(StudyInvalid, match="cannot be seen") as caught:
        parse_study(text)
    assert [fault.key for fault in caught.value.faults] == ["study.question"]
    assert "\x1b" not in str(caught.value)
    # A space that typography wants is none of them.
    assert parse_study(TEN_LINES.replace('question = "', 'question = "Quoi\u00a0? '))


def test_a_segment_has_one_spelling() -> None:
    digests = {
        Study(
            study=parse_study(TEN_LINES).study,
            target=read_target({"kind": "segmentation", "segment": name}),
            network=Network(name="unet"),
        ).update_digest
        for name in ("left lung", "Left Lung ", " LEFT  lung")
    }
    assert len(digests) == 1


# The example that `cloister study new` writes


def test_the_example_is_valid_and_says_defaults_only() -> None:
    study = parse_study(EXAMPLE)
    bare = Study(study=study.study, target=study.target)
    assert study.digest == bare.digest


def test_the_commented_keys_of_the_example_are_the_defaults() -> None:
    commented = re.compile(r"^# (\w+ = )", re.MULTILINE)
    text = commented.sub(r"\1", EXAMPLE)
    assert len(commented.findall(EXAMPLE)) > 20
    assert parse_study(text).digest == parse_study(EXAMPLE).digest


def test_the_learning_rate_over_the_rounds() -> None:
    training = parse_study(with_lines("[training]\nrounds = 4\nlearning_rate = 2.0")).training
    assert [training.rate_of(number) for number in (1, 4)] == [2.0, 2.0]
    training = training.model_copy(update={"schedule": "cosine"})
    rates = [training.rate_of(number) for number in (1, 2, 3, 4)]
    assert rates == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])


def test_the_study_of_a_segmentation_in_the_documents_is_one() -> None:
    root = Path(__file__).parents[3] / "docs"
    study = load_study(root / "studies" / "lungs.toml")
    assert study.task == Segmentation("lungs")
    shown = (root / "dicom.md").read_text("utf-8").split("## Segmentation")[1].split("```")[1]
    about = TEN_LINES.split("[target]", maxsplit=1)[0].split("[input]", maxsplit=1)[0]
    given = parse_study(about + shown)
    assert given.target == study.target
    assert given.network == study.network


def test_a_segmentation_has_a_hash_of_its_own() -> None:
    plain = parse_study(TEN_LINES)
    assert set(json.loads(plain.canonical())["target"]) == {"kind", "column", "classes"}
    marked = {"kind": "segmentation", "segment": "lungs"}
    study = Study(study=plain.study, target=read_target(marked), network=Network(name="unet"))
    assert json.loads(study.canonical())["target"] == marked
    assert study_from_canonical(study.canonical()) == study
    other = study.model_copy(update={"target": read_target({**marked, "segment": "x"})})
    assert other.digest != study.digest
    assert read_target(study.target.model_dump()) == study.target


@pytest.mark.parametrize(
    ("target", "key"),
    [
        ('kind = "segmentation"', "segment"),
        ('kind = "segmentation"\nsegment = " "', "segment"),
        ('kind = "segmentation"\nsegment = "a"\ncolumn = "b"', "column"),
        ('kind = "segmentation"\nsegment = "a"\nclasses = ["b", "c"]', "classes"),
        ('column = "b"\nclasses = ["b", "c"]\nsegment = "a"', "segment"),
        ('kind = "marking"\ncolumn = "b"\nclasses = ["b", "c"]', "kind"),
    ],
)
def test_a_target_that_is_neither_is_told_by_its_key(target: str, key: str) -> None:
    head = TEN_LINES.split("[target]", maxsplit=1)[0].split("[input]", maxsplit=1)[0]
    text = f"{head}[target]\n{target}\n\n[network]\nname = 'unet'\n"
    found = [one for one in faults(text) if one[1].startswith("target")]
    assert [one[1] for one in found] == [f"target.{key}"]
    assert found[0][0] > 0


def test_the_docstring_names_every_key() -> None:
    assert Study.__doc__ is not None
    listed = {
        table: [key.strip() for key in keys.split(",")]
        for table, keys in re.findall(r"- of (\w+): ([^;.]+)[;.]", " ".join(Study.__doc__.split()))
    }
    listed.pop("target")
    tables = {name: field.annotation for name, field in Study.model_fields.items()}
    tables.pop("target")
    assert listed == {name: list(table.model_fields) for name, table in tables.items()}  # type: ignore[union-attr]


def test_the_study_of_volumes_in_the_documents_is_one() -> None:
    root = Path(__file__).parents[3] / "docs"
    study = load_study(root / "studies" / "ct-volumes.toml")
    assert (study.input.depth, study.input.spacing) == (32, 5.0)
    shown = (root / "dicom.md").read_text("utf-8").split("## Volumes")[1].split("```")[1]
    given = parse_study(TEN_LINES.split("[training]", maxsplit=1)[0] + shown)
    assert given.input.model_copy(update={"window": study.input.window}) == study.input
    assert given.network == study.network
