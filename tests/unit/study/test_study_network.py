"""A study's network fits its input and its target, or the study is refused with those that do."""

from __future__ import annotations

import re

import pytest

from cloister_fl.errors import StudyInvalid
from cloister_fl.networks.registry import REGISTRY
from cloister_fl.study import parse, replace
from cloister_fl.tasks.classification import Classification
from support import studies

LUNGS = {"kind": "segmentation", "segment": "lungs", "column": None, "classes": None}
VOLUMES = {"modalities": ["CT"], "dimensions": 3, "depth": 8, "spacing": 2.0, "size": 32}


def offered(**tables: studies.Table) -> list[str]:
    """The networks that the refusal of a study says to choose from."""
    with pytest.raises(StudyInvalid) as caught:
        parse(studies.study_text(**tables))
    (fault,) = caught.value.faults
    assert fault.key == "network.name"
    listed = re.search(r"Choose one of: (.+)\.", fault.message)
    assert listed is not None
    return listed[1].split(", ")


CASES: list[dict[str, studies.Table]] = [
    {"network": {"name": "small-cnn-3d"}},
    {"network": {"name": "unet"}},
    {"network": {"name": "small-cnn"}, "target": LUNGS},
    {"network": {"name": "small-cnn-3d"}, "target": LUNGS},
    {"network": {"name": "small-cnn"}, "input": VOLUMES},
    {"network": {"name": "unet"}, "input": VOLUMES},
]


@pytest.mark.parametrize("tables", CASES, ids=str)
def test_what_is_offered_instead_is_accepted(tables: dict[str, studies.Table]) -> None:
    names = offered(**tables)
    assert names
    # All that are not offered are refused, too: the list is whole.
    fit = []
    for name, entry in REGISTRY.items():
        needed = {key: "0" * 64 for key, one in entry.arguments.items() if one.default is None}
        if "architecture" in needed:
            needed["architecture"] = "resnet18"
        network = {"name": name, "arguments": needed}
        try:
            parse(studies.study_text(**{**tables, "network": network}))
        except StudyInvalid:
            continue
        fit.append(name)
    assert names == fit


def test_a_network_that_tells_classes_apart_gives_no_single_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Classification, "outputs", property(lambda _: 1))
    for name in ("filter-bank", "efficientnet-lite0"):
        names = offered(network={"name": name})
        assert "small-cnn" in names
        assert {"filter-bank", "efficientnet-lite0", "frozen-backbone"}.isdisjoint(names)
    assert replace(studies.study(), network={"name": "small-cnn"}).task.outputs == 1
