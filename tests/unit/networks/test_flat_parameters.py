"""Model state to one vector and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cloister_fl.errors import NetworkUnfit, UpdateInvalid
from cloister_fl.networks.flat_parameters import Layout, flatten, layout_of, load
from cloister_fl.networks.registry import build
from cloister_fl.study.schema import Network


@pytest.fixture
def network() -> nn.Module:
    return build(Network(arguments={"width": 4}), 3, 1, size=16, seed=1)


def test_round_trip_is_exact(network: nn.Module) -> None:
    vector = flatten(network)
    assert vector.dtype == np.float32
    assert len(vector) == layout_of(network).size
    other = build(Network(arguments={"width": 4}), 3, 1, size=16, seed=2)
    assert not np.array_equal(flatten(other), vector)
    load(other, vector)
    assert np.array_equal(flatten(other), vector)
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(other(images), network(images))


def test_nothing_is_shared_with_the_caller(network: nn.Module) -> None:
    vector = flatten(network)
    load(network, vector)
    vector[:] = 7
    assert not (flatten(network) == 7).any()
    copy = flatten(network)
    copy[:] = 7
    assert not (flatten(network) == 7).any()


def test_order_is_that_of_the_names() -> None:
    module = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1, bias=False))
    layout = layout_of(module)
    assert layout == Layout(("0.weight", "0.bias", "1.weight"), ((1, 2), (1,), (1, 1)))
    load(module, np.array([1, 2, 3, 4], np.float32))
    assert module[0].weight.tolist() == [[1, 2]]
    assert module[1].weight.tolist() == [[4]]


def test_digest_tells_names_and_shapes_apart() -> None:
    layouts = [
        Layout(("a",), ((2, 3),)),
        Layout(("a",), ((3, 2),)),
        Layout(("b",), ((2, 3),)),
        Layout(("a", "b"), ((2,), (3,))),
    ]
    assert len({layout.digest for layout in layouts}) == len(layouts)
    assert all(len(layout.digest) == 64 for layout in layouts)
    assert layouts[0].digest == Layout(("a",), ((2, 3),)).digest


def test_frozen_parameters_stay_out() -> None:
    module = nn.Linear(2, 2)
    module.weight.requires_grad_(False)
    assert layout_of(module).names == ("bias",)
    weight = module.weight.clone()
    load(module, np.ones(2, np.float32))
    assert torch.equal(module.weight, weight)


@pytest.mark.parametrize("fault", ["short", "long", "nan", "inf", "type", "rank", "list"])
def test_bad_vectors_are_refused_and_change_nothing(network: nn.Module, fault: str) -> None:
    good = flatten(network)
    bad = {
        "short": good[:-1],
        "long": np.append(good, np.float32(0)),
        "nan": np.where(np.arange(len(good)) == 3, np.float32(np.nan), good),
        "inf": np.where(np.arange(len(good)) == 3, np.float32(-np.inf), good),
        "type": good.astype(np.float64),
        "rank": good[None],
        "list": good.tolist(),
    }[fault]
    with pytest.raises(UpdateInvalid):
        load(network, bad)
    assert np.array_equal(flatten(network), good)


def test_weights_that_are_not_finite_are_refused(network: nn.Module) -> None:
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(UpdateInvalid):
        flatten(network)


def test_buffers_and_other_types_are_refused() -> None:
    with pytest.raises(NetworkUnfit, match="buffer"):
        layout_of(nn.BatchNorm2d(2))
    with pytest.raises(NetworkUnfit, match="float32"):
        layout_of(nn.Linear(2, 2).double())
