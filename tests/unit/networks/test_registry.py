"""The registry: what is built, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cloister_fl.errors import NetworkUnfit
from cloister_fl.networks.batch_independence import require_private
from cloister_fl.networks.flat_parameters import flatten, layout_of
from cloister_fl.networks.registry import REGISTRY, build, resolve
from cloister_fl.study.schema import Network

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "small-cnn": 16,
    "small-cnn-3d": 16,
    "unet": 16,
    "filter-bank": 32,
    "efficientnet-lite0": 32,
    "resnet18": 32,
    "densenet121": 32,
}


@pytest.mark.long
@pytest.mark.parametrize("name", SIZES)
def test_every_entry_is_private_and_plain(name: str) -> None:
    entry = REGISTRY[name]
    assert entry.name == name
    assert entry.smallest == SIZES[name]
    depth = 4 if entry.dimensions == 3 else None
    network = build(Network(name=name), 3, 1, size=entry.smallest, seed=5, depth=depth)
    assert network.training
    places = (entry.smallest, entry.smallest) if depth is None else (depth, 16, 16)
    answer = network(torch.zeros(2, 1, *places))
    assert answer.shape == ((2, 3, *places) if entry.answers == "pixel" else (2, 3))
    assert not list(network.named_buffers())
    require_private(network, size=entry.smallest, depth=depth)


def test_the_whole_registry_is_tested() -> None:
    # The one that stands on a file of its user has tests of its own.
    assert {*SIZES, "frozen-backbone"} == set(REGISTRY)


@pytest.mark.parametrize("name", ["small-cnn", "resnet18"])
def test_weights_come_from_the_seed_alone(name: str) -> None:
    def weights(seed: int) -> np.ndarray:
        return flatten(build(Network(name=name), 2, 1, size=32, seed=seed))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert np.array_equal(weights(3), first)
    assert not np.array_equal(weights(4), first)


def test_default_of_the_small_network_is_small() -> None:
    sizes = [layout_of(build(Network(), outputs, 1, size=16, seed=0)).size for outputs in (2, 5)]
    assert 5_000 < sizes[0] < 30_000
    wide = Network(arguments={"width": 24})
    assert layout_of(build(wide, 2, 1, size=16, seed=0)).size > 3 * sizes[0]


def test_the_network_of_volumes_has_about_as_many_weights_as_it_says() -> None:
    network = build(Network(name="small-cnn-3d"), 2, 1, size=16, seed=0, depth=8)
    # Kernels of 27 places, 12 to 24 to 48 to 48 channels; GroupNorm; a head on means and maxima.
    kernels = 27 * (12 + 12 * 24 + 24 * 48 + 48 * 48)
    assert layout_of(network).size == kernels + 2 * (12 + 24 + 48 + 48) + 2 * (2 * 48 + 1)
    assert layout_of(network).size == 101_870


def test_a_volume_is_no_image_and_an_image_no_volume() -> None:
    with pytest.raises(NetworkUnfit, match="dimensions is 2") as flat:
        resolve(Network(name="small-cnn-3d"), size=32)
    assert "small-cnn, " in str(flat.value)
    for name, entry in REGISTRY.items():
        if entry.dimensions == 2 and name != "frozen-backbone":
            with pytest.raises(NetworkUnfit, match="Choose one of: small-cnn-3d"):
                resolve(Network(name=name), size=64, depth=8)
    entry, arguments = resolve(Network(name="small-cnn-3d"), size=32, depth=8)
    assert (entry.name, arguments) == ("small-cnn-3d", {"width": 12})


def test_a_volume_that_hears_its_neighbour_is_refused() -> None:
    class Whispering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build(Network(name="small-cnn-3d"), 2, 1, size=16, seed=0, depth=4)

        def forward(self, volumes: Tensor) -> Tensor:
            logits: Tensor = self.inner(volumes + 1e-4 * volumes.flip(0))
            return logits

    with pytest.raises(NetworkUnfit, match="depends on another image"):
        require_private(Whispering(), size=16, depth=4)


def test_arguments_reach_the_network() -> None:
    network = build(Network(name="resnet18", arguments={"groups": 8}), 2, 1, size=32, seed=0)
    norms = [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
    assert len(norms) == 20
    assert {norm.num_groups for norm in norms} == {8}


@pytest.mark.parametrize(
    ("network", "size", "says"),
    [
        (Network(name="resnet-18"), 64, "Did you mean 'resnet18'"),
        (Network(name="transformer-xl"), 64, "Known: small-cnn"),
        (Network(arguments={"widht": 8}), 64, "Did you mean 'width'"),
        (Network(arguments={"width": 5}), 64, "in steps of 4"),
        (Network(arguments={"width": 128}), 64, "from 4 to 64"),
        (Network(arguments={"width": True}), 64, "cannot be True"),
        (Network(arguments={"width": 8.0}), 64, "cannot be 8.0"),
        (Network(arguments={"width": "8"}), 64, "cannot be '8'"),
        (Network(name="resnet18", arguments={"groups": 12}), 64, "a divisor of 32"),
        (Network(name="densenet121"), 16, "input.size to 32"),
    ],
)
def test_what_cannot_be_built_is_refused(network: Network, size: int, says: str) -> None:
    with pytest.raises(NetworkUnfit, match=says):
        resolve(network, size=size)


class Mixing(nn.Module):
    """Takes the mean of the batch away: Opacus' validator lets it pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 2)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(start_dim=1)
        result: Tensor = self.layer(flat - flat.mean(dim=0))
        return result


class Once(Mixing):
    """Lets one image in a hundred thousand through: still not exactly zero."""

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(start_dim=1)
        result: Tensor = self.layer(flat + 1e-5 * flat.flip(0))
        return result


def around(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(4 * 14 * 14, 2))


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (around(nn.BatchNorm2d(4)), "mixes the images"),
        (around(nn.BatchNorm2d(4, affine=False, track_running_stats=False)), "mixes the images"),
        (around(nn.InstanceNorm2d(4, track_running_stats=True)), "running statistics"),
        (around(nn.ReLU(inplace=True)), "in place"),
        (around(nn.ReLU()).eval(), "Opacus refuses"),
        (Mixing(), "depends on another image"),
        (Once(), "depends on another image"),
    ],
)
def test_what_mixes_patients_is_refused(module: nn.Module, says: str) -> None:
    with pytest.raises(NetworkUnfit, match=says):
        require_private(module, size=16)


class Hears(nn.Module):
    """Each image's features, plus what ``heard`` makes of those of the whole batch."""

    def __init__(self, heard: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 2)
        self.heard = heard

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits + self.heard(logits)


class Remembers(nn.Module):
    """Adds the mean of the batch before: a number in Python, so no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 2)
        self.last = 0.0

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1)) + self.last
        self.last = float(images.detach().mean())
        return logits


class Gated(nn.Module):
    """Mixes behind a weight that is zero beside one that is not: a server may send another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 2)
        self.gate = nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits + self.gate[0] * logits.mean(dim=0)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Hears(lambda logits: logits.detach().mean(dim=0)), "on another image"),
        (Hears(lambda logits: torch.sign(logits[:, :1]).sum()), "on another image"),
        (
            Hears(lambda logits: logits.mean(dim=0) if len(logits) > 2 else 0 * logits),
            "on another image",
        ),
        (Remembers(), "on images that came before"),
        (Gated(), "on another image"),
    ],
)
def test_what_mixes_patients_without_a_gradient_or_now_and_then_is_refused(
    module: nn.Module, says: str
) -> None:
    with pytest.raises(NetworkUnfit, match=f"depends {says}"):
        require_private(module.train(), size=16)


def test_what_passed_says_nothing_of_a_module_with_another_flag() -> None:
    """Both have the same type and text."""

    class Flagged(Mixing):
        def __init__(self, *, share: bool) -> None:
            super().__init__()
            self.share = share

        def forward(self, images: Tensor) -> Tensor:
            if self.share:
                return super().forward(images)
            logits: Tensor = self.layer(images.flatten(1))
            return logits

    require_private(Flagged(share=False), size=16)
    with pytest.raises(NetworkUnfit, match="on another image"):
        require_private(Flagged(share=True), size=16)
    require_private(Hears(torch.zeros_like), size=16)
    with pytest.raises(NetworkUnfit, match="on another image"):
        require_private(Hears(lambda logits: logits.mean(dim=0)), size=16)


def test_dropout_is_no_leak() -> None:
    require_private(around(nn.Dropout(0.5)).train(), size=16)


def test_buffers_are_refused() -> None:
    module = around(nn.ReLU())
    module.register_buffer("mean", torch.zeros(1))
    with pytest.raises(NetworkUnfit, match="buffer"):
        require_private(module, size=16)


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.ReLU()])
def test_what_treats_each_image_by_itself_passes(layer: nn.Module) -> None:
    require_private(around(layer), size=16)


def test_the_filter_bank_answers_to_a_blob_in_all_orientations_and_to_a_ridge_in_one() -> None:
    from cloister_fl.networks.filter_bank import ORIENTATIONS, SCALES, FilterBank

    network = FilterBank(2)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    blob = torch.exp(-((x - 32) ** 2 + (y - 32) ** 2) / (2 * 3.0**2))
    ridge = torch.exp(-((x - 32) ** 2) / (2 * 3.0**2))
    answers = network.features(torch.stack([blob, ridge]).unsqueeze(1))
    assert answers.shape == (2, len(SCALES) * ORIENTATIONS, 16, 16)
    # The weakest and the strongest orientation of the coarsest scale, where the thing is.
    weakest, strongest = answers[:, -ORIENTATIONS, 8, 8], answers[:, -1, 8, 8]
    assert weakest[0] > 0.8 * strongest[0] > 0
    assert weakest[1] < 0.2 * strongest[1]


def test_the_filter_bank_ignores_a_shift_of_brightness() -> None:
    from cloister_fl.networks.filter_bank import FilterBank

    network = FilterBank(3)
    images = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(images), network(images + 0.7), atol=1e-4, rtol=0)
    assert torch.equal(network(images)[:, 0], torch.zeros(4))


def test_only_the_head_of_the_filter_bank_is_trained() -> None:
    network = build(Network(name="filter-bank"), 2, 1, size=64, seed=0)
    assert flatten(network).size == 12 * 32 + 32 + 2 * 32 + 32 + 1
