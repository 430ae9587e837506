"""Frozen backbones: as an outside implementation has them, by their hash alone, never sent."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cloister_fl.errors import ExtraMissing, NetworkUnfit, StudyInvalid, WeightsUnfit
from cloister_fl.networks import pretrained
from cloister_fl.networks.backbones import backbone_body
from cloister_fl.networks.batch_independence import require_private
from cloister_fl.networks.efficientnet_lite import EfficientNetLite0, expected_relu6
from cloister_fl.networks.flat_parameters import flatten, layout_of, load
from cloister_fl.networks.pretrained import PINNED, Weights, backbone, require
from cloister_fl.networks.registry import build
from cloister_fl.study.schema import Network, Study, study_from_canonical
from support.errors import raises

LITE0 = Weights("efficientnet-lite0", PINNED["efficientnet-lite0"], packaged=True)


@pytest.fixture(autouse=True)
def no_models_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(pretrained.MODELS_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def images(count: int, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand((count, 1, size, size), generator=generator) * 4 - 2


def written(folder: Path, architecture: str, channels: int = 3) -> str:
    """Write made-up weights of an architecture as a file, and return its hash."""
    torch.manual_seed(3)
    module = backbone_body(architecture, channels)
    tensors = {}
    for name, value in module.state_dict().items():
        # As PyTorch's model zoo names them, with a head that is not wanted and no counters.
        if not name.endswith("num_batches_tracked"):
            tensors[name.replace(".layers.", ".")] = value + 0.01
    tensors["fc.weight"] = torch.zeros(5, 7)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "any-name.safetensors")
    return hashlib.sha256((folder / "any-name.safetensors").read_bytes()).hexdigest()


def local(architecture: str, sha256: str) -> Network:
    return Network(
        name="frozen-backbone", arguments={"architecture": architecture, "sha256": sha256}
    )


@pytest.mark.long
@pytest.mark.parametrize("size", [224, 65])
def test_the_features_are_those_of_the_published_implementation(size: int) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    tensors = torch.load(require(LITE0), weights_only=True)
    theirs = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    theirs.load_state_dict(tensors)
    pixels = images(2, size).expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = theirs.eval().extract_features(pixels).mean(dim=(2, 3))
        ours = backbone(LITE0)(pixels)
    # Ours are centred: by a Gaussian of the last batch norm's mean and deviation, drawn here.
    bias, weight = tensors["_bn1.bias"], tensors["_bn1.weight"]
    normal = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(2))
    drawn = (bias + weight * normal).clamp(0, 6).mean(dim=0)
    centre = expected_relu6(bias, weight)
    torch.testing.assert_close(centre, drawn, atol=0.06, rtol=0)
    expected = expected - centre
    assert ours.shape == (2, 1280)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_the_centre_is_the_mean_of_a_clipped_gaussian() -> None:
    mean, deviation = torch.tensor([-3.0, 0.0, 3.0, 6.0, 9.0]), torch.tensor([1, -2, 4, 0.5, 3])
    z = torch.linspace(-9, 9, 90_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / torch.exp(-(z**2) / 2).sum()
    summed = (mean + deviation * z[:, None]).clamp(0, 6).T @ density
    torch.testing.assert_close(expected_relu6(mean, deviation), summed.float())


def test_pixels_reach_the_backbone_as_it_learned_them() -> None:
    network = build(Network(name="efficientnet-lite0"), 2, size=64, seed=0)
    pixels = images(1)
    # The product's pixels are (x - 0.5) / 0.25 of x from 0 to 1.
    grey = pixels * 0.25 + 0.5
    # Google's Lite networks take (byte - 127) / 128.
    with torch.no_grad():
        expected = backbone(LITE0)(((grey * 255 - 127) / 128).expand(-1, 3, -1, -1))
        features = network.features(pixels)
    torch.testing.assert_close(features, expected / expected.norm(), atol=1e-6, rtol=1e-4)


def test_one_byte_makes_other_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pth"
    shutil.copy(require(LITE0), copy)
    monkeypatch.setattr(pretrained, "_packaged", lambda: copy)
    assert require(LITE0) == copy
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    with raises(WeightsUnfit, match="do not have the expected hash"):
        require(LITE0)
    pretrained._backbone.cache_clear()
    with raises(WeightsUnfit, match="do not have the expected hash"):
        backbone(LITE0)


def test_bytes_that_change_between_check_and_use_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sha256 = written(tmp_path / "models", "resnet18")
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"other")
    with raises(WeightsUnfit, match="changed while it was read"):
        backbone(Weights("resnet18", sha256))


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with raises(ExtraMissing, match=r"install.*pretrained"):
        require(LITE0)


def test_the_studys_hash_binds_the_pinned_weights() -> None:
    def study(**network: object) -> Study:
        return Study.model_validate(
            {
                "study": {"name": "a", "question": "b"},
                "target": {"column": "c", "classes": ["no", "yes"]},
                "network": {"name": "efficientnet-lite0", **network},
            },
            strict=False,
        )

    plain = study()
    form = json.loads(plain.canonical())
    assert form["network"]["arguments"] == {"weights": LITE0.sha256}
    other = study(arguments={"weights": "0" * 64})
    assert other.digest != plain.digest
    with pytest.raises(NetworkUnfit, match="weights"):
        build(other.network, 2, size=64, seed=0)
    # A message that leaves the hash out is no canonical form.
    form["network"]["arguments"] = {}
    with pytest.raises(StudyInvalid):
        study_from_canonical(json.dumps(form, sort_keys=True, separators=(",", ":")))


def test_nothing_of_the_backbone_is_in_vector_or_model() -> None:
    network = build(Network(name="efficientnet-lite0"), 3, size=64, seed=0)
    pixels = images(2)
    with torch.no_grad():
        before = network.features(pixels)
    assert layout_of(network).names == ("last.weight", "last.bias")
    assert layout_of(network).shapes == ((2, 1280), (2,))
    assert set(network.state_dict()) == {"last.weight", "last.bias"}
    assert flatten(network).size == 2 * 1281
    load(network, np.ones(2 * 1281, np.float32))
    with torch.no_grad():
        assert torch.equal(network.features(pixels), before)
    assert all(not p.requires_grad for p in backbone(LITE0).parameters())


def test_a_network_is_built_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that only sums heads needs neither file nor package."""
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    pretrained._backbone.cache_clear()
    network = build(Network(name="efficientnet-lite0"), 2, size=64, seed=0)
    assert flatten(network).size == 1281
    with raises(ExtraMissing):
        network(images(1))


def test_features_and_head_are_the_network() -> None:
    network = build(Network(name="efficientnet-lite0"), 3, size=64, seed=0)
    generator = torch.Generator().manual_seed(1)
    load(network, torch.randn(2 * 1281, generator=generator).numpy())
    pixels = images(3)
    with torch.no_grad():
        logits = network(pixels)
        assert torch.equal(network.head(network.features(pixels)), logits)
    assert torch.equal(logits[:, 0], torch.zeros(3))
    assert logits[:, 1:].abs().min() > 0
    torch.testing.assert_close(network.features(pixels).norm(dim=1), torch.ones(3))


@pytest.mark.long
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("architecture", "width"), [("resnet18", 512), ("densenet121", 1024)])
def test_weights_of_ones_own_are_found_by_hash(
    tmp_path: Path, architecture: str, width: int, channels: int
) -> None:
    sha256 = written(tmp_path / "site" / "models", architecture, channels)
    network = build(
        local(architecture, sha256), 2, size=32, seed=0, models=tmp_path / "site" / "models"
    )
    network.require()
    torch.manual_seed(3)
    body = backbone_body(architecture, channels)
    with torch.no_grad():
        for name, value in body.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                value.add_(0.01)
    pixels = images(2, 32)
    if channels == 3:
        grey = pixels * 0.25 + 0.5
        pixels = torch.cat(
            [(grey - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))], dim=1
        )
    with torch.no_grad():
        expected = body.eval()(pixels)
        features = network.features(images(2, 32))
    assert features.shape == (2, width)
    torch.testing.assert_close(
        features, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-3
    )
    require_private(network, size=32)


def test_the_folder_of_the_machine_and_the_current_one_are_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = written(tmp_path / "shared", "resnet18")
    weights = Weights("resnet18", sha256, models=tmp_path / "site" / "models")
    with raises(WeightsUnfit, match=f"None of 0 .* {sha256}"):
        require(weights)
    monkeypatch.setenv(pretrained.MODELS_VARIABLE, str(tmp_path / "shared"))
    assert require(weights).parent == tmp_path / "shared"
    monkeypatch.delenv(pretrained.MODELS_VARIABLE)
    (tmp_path / "shared").rename(tmp_path / "models")
    assert require(weights).parent == tmp_path / "models"


def test_weights_with_another_hash_are_refused(tmp_path: Path) -> None:
    sha256 = written(tmp_path / "models", "resnet18")
    file = tmp_path / "models" / "any-name.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with raises(WeightsUnfit, match="None of 1 safetensors files"):
        require(Weights("resnet18", sha256))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "missing, of another shape"),
        ({"conv1.weight": torch.zeros(64, 4, 7, 7)}, "neither one channel nor three"),
        ({"bias": torch.zeros(3)}, "neither one channel nor three"),
        (None, "not a safetensors file"),
    ],
)
def test_what_is_no_such_network_is_refused(
    tmp_path: Path, content: dict[str, torch.Tensor] | None, says: str
) -> None:
    file = tmp_path / "models" / "x.safetensors"
    file.parent.mkdir()
    if content is None:
        file.write_bytes(b"\x80\x04K\x01.")
    else:
        save_file(content, file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    with raises(WeightsUnfit, match=says):
        backbone(Weights("resnet18", sha256))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "needs the argument 'architecture'"),
        ({"architecture": "resnet18"}, "needs the argument 'sha256'"),
        ({"architecture": "alexnet", "sha256": "0" * 64}, "one of efficientnet-lite0, resnet18"),
        ({"architecture": "resnet18", "sha256": "F" * 64}, "64 hexadecimal digits, lower case"),
        ({"architecture": "resnet18", "sha256": "../x"}, "64 hexadecimal digits, lower case"),
    ],
)
def test_arguments_that_name_no_weights_are_refused(arguments: dict[str, str], says: str) -> None:
    with pytest.raises(NetworkUnfit, match=says):
        build(Network(name="frozen-backbone", arguments=arguments), 2, size=32, seed=0)


def test_the_architecture_has_the_published_number_of_weights() -> None:
    # Google's table for Lite0: 4.7 million with the head of 1,000 classes.
    body = sum(p.numel() for p in EfficientNetLite0().parameters())
    assert body + 1281 * 1000 == 4_652_008
