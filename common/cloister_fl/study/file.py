"""Reader of the study file: all faults at once, each with its line."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import (
    ValidationInfo,
    field_validator,
    model_validator,
)

from cloister_fl.errors import Fault, InputError, NetworkUnfit, StudyInvalid
from cloister_fl.study.gradient_engines import ENGINE_KEY, engine_fault
from cloister_fl.study.schema import Input, Network, Study, study_from_canonical
from cloister_fl.system import arguments
from cloister_fl.system.arguments import StrPath
from cloister_fl.system.toml import (
    KeyedValueError,
    KeyedValueErrors,
    judge,
    parse,
    read_text,
)
from cloister_fl.system.toml_positions import key_lines

_DRAWN_FROM = {"input", "target", "network", "training"}
"""Tables that say what the initial model is, see ``initial_model``."""


class _StudyFile(Study):
    """A study as a person writes it: judged against the networks that are known here, too."""

    @field_validator("network")
    @classmethod
    def _known_network(cls, network: Network, info: ValidationInfo) -> Network:
        from cloister_fl.networks.registry import registered

        try:
            entry = registered(network.name)
        except NetworkUnfit as error:
            raise KeyedValueError("name", f"{error.what} {error.remedy}") from None
        # Whether it has the input's dimensions is asked where the input has no fault.
        size = info.data.get("input", Input()).size
        faults = [
            KeyedValueError(one.key, f"{one.what} {one.remedy}")
            for one in entry.misfits(network.arguments, size)
        ]
        if faults:
            raise KeyedValueErrors(faults)
        return network

    @model_validator(mode="after")
    def _sound_engine(self) -> _StudyFile:
        # Of a file alone: models and certificates of studies that were trained stay readable.
        fault = engine_fault(self)
        if fault is not None:
            raise KeyedValueError(ENGINE_KEY, *fault)
        return self


def parse_study(text: str, name: str = "study.toml") -> Study:
    """Validate the text of a study file.

    Args:
        text: TOML, such as ``cloister study new`` writes it.
        name: what errors call it.

    Raises:
        StudyInvalid: with every fault, its line and the nearest key.
        OptionInvalid: an argument is not text.
    """
    text, name = arguments.text("text", text), arguments.text("name", name)
    study, faults = parse(text, _StudyFile)
    if study is None:
        raise StudyInvalid.of(name, faults)
    _refuse_network(study, text, name)
    return study_from_canonical(study.canonical())


def _refuse_network(study: Study, text: str, name: str) -> None:
    """Refuse a network, also the default one, that fits neither the input nor the target."""
    from cloister_fl.study.study_network import resolve_for

    try:
        resolve_for(study)
    except NetworkUnfit as error:
        lines = key_lines(text)
        line = lines.get(("network", "name"), 0)
        for key in (("input", "dimensions"), ("target", "kind")):
            line = line or lines.get(key, 0)
        fault = Fault(line, "network.name", f"{error.what} {error.remedy}")
        raise StudyInvalid.of(name, (fault,)) from None


def load_study(path: StrPath) -> Study:
    """Read and validate a study file.

    Args:
        path: the file, such as ``cloister study new`` writes it.

    Raises:
        FileUnreadable: the file cannot be read.
        StudyInvalid: it has faults; all of them are named, each with its line.
        OptionInvalid: it is no path.
    """
    file = arguments.path("path", path)
    return parse_study(read_text(file), file.name)


def given_study(study: Study | StrPath) -> Study:
    """Return a study that a program gives, read from its file where it gives a path.

    Raises:
        FileUnreadable, StudyInvalid: see ``load_study``.
        OptionInvalid: it is neither.
    """
    if isinstance(study, Study):
        return study
    try:
        file = arguments.path("study", study)
    except InputError:
        remedy = "Give the path of a study file, or a study from study.load or study.parse."
        raise arguments.refused("study", study, remedy) from None
    return load_study(file)


def replace(study: Study | StrPath, /, **tables: Mapping[str, object]) -> Study:
    """Return a study with some keys changed, judged as a file is.

    ``replace(study, privacy={"epsilon": 1.0}, training={"rounds": 4})`` keeps all other keys, but
    for the hash of the initial model where that may be another one then.

    Args:
        study: stays as it is; or the path of its file.
        tables: by table, the keys to change and their values.

    Raises:
        StudyInvalid: with every fault.
        FileUnreadable, OptionInvalid: the study is a path that cannot be read, or neither.
    """
    name = "The changed study"
    data = json.loads(given_study(study).canonical())
    for table, keys in tables.items():
        changes = isinstance(keys, Mapping) and isinstance(data.get(table, {}), dict)
        # What is no table is judged as it is, and refused.
        data[table] = {**data.get(table, {}), **keys} if changes else keys
    training = data.get("training")
    if _DRAWN_FROM & tables.keys() and isinstance(training, dict):
        stated = tables.get("training", {})
        if not (isinstance(stated, Mapping) and "initial_model" in stated):
            training.pop("initial_model", None)
    changed, faults = judge(data, _StudyFile)
    if changed is None:
        raise StudyInvalid.of(name, faults)
    _refuse_network(changed, "", name)
    return study_from_canonical(changed.canonical())
