"""Registry of the networks that a study may name.

Code never travels, so a study names one of these. Each is built without batch statistics, without
in-place operations and without buffers, from its seed alone;
``batch_independence`` proves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister_fl.errors import NetworkUnfit
from cloister_fl.networks.backbones import _monai_nets
from cloister_fl.networks.pretrained import PINNED, WIDTHS, Weights
from cloister_fl.networks.spec import Argument, Entry, NetworkChoice, Value, Word, nearest
from cloister_fl.system import arguments as given

if TYPE_CHECKING:
    from torch import Tensor, nn

_MOST_OUTPUTS, _MOST_CHANNELS, _LARGEST = 1 << 16, 1 << 10, 1 << 13
"""Beyond these a network does not fit into memory; a study asks for far less."""


def build(
    network: NetworkChoice,
    outputs: int,
    in_channels: int = 1,
    *,
    size: int,
    seed: int,
    depth: int | None = None,
    models: given.StrPath | None = None,
) -> nn.Module:
    """Build the network that a study names, with weights drawn from ``seed``.

    The same arguments give the same weights on every machine with the same torch; the global
    generators of torch are left as they were.

    Args:
        network: the study's choice.
        outputs: width of the last layer, 1 or more.
        in_channels: channels of the input, 1 or more.
        size: side of the square input, in pixels.
        seed: 0 or more.
        depth: slices of a volume; None for images.
        models: a site's own folder of pretrained weights. They are read when features are first
            computed, and no sooner.

    Returns:
        A module in training mode: (batch, in_channels, size, size), of volumes (batch,
        in_channels, depth, size, size), to (batch, outputs) logits; of one that answers for
        each pixel, to (batch, outputs, size, size).

    Raises:
        NetworkUnfit: the network or an argument is unknown, or the input is too small or has
            another number of dimensions.
        ExtraMissing: the network needs a package that is not installed.
        OptionInvalid: an argument is not what is described here.
    """
    _refuse_choice(network)
    outputs = given.whole("outputs", outputs, 1, _MOST_OUTPUTS)
    in_channels = given.whole("in_channels", in_channels, 1, _MOST_CHANNELS)
    size = given.whole("size", size, 1, _LARGEST)
    depth = None if depth is None else given.whole("depth", depth, 1, _LARGEST)
    seed = given.whole("seed", seed, 0, given.MAX_SEED)
    models = None if models is None else given.path("models", models)
    entry, arguments = resolve(network, size=size, depth=depth)
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = entry.builder(outputs, in_channels, arguments, models)
    return module.train()


def _refuse_choice(network: Any) -> None:
    named = isinstance(getattr(network, "name", None), str)
    if not named or not isinstance(getattr(network, "arguments", None), dict):
        remedy = "Give networks.Choice(NAME), or a study's table 'network'."
        raise given.refused("network", network, remedy)


def resolve(
    network: NetworkChoice, *, size: int, depth: int | None = None
) -> tuple[Entry, dict[str, Value]]:
    """Look a network up and fill in its defaults, without importing torch.

    Raises:
        NetworkUnfit: as ``build``.
    """
    entry = registered(network.name)
    for misfit in entry.misfits(network.arguments, size):
        raise NetworkUnfit(misfit.what, remedy=misfit.remedy)
    if (depth is not None) != (entry.dimensions == 3):
        asked = 2 if depth is None else 3
        fit = [one.name for one in REGISTRY.values() if one.dimensions == asked]
        raise other_dimensions(entry, asked, fit)
    all_of = {name: one.default for name, one in entry.arguments.items()} | network.arguments
    # What is given was accepted above, so it is a whole number or a word.
    return entry, {
        name: one if isinstance(one, str) else int(one or 0) for name, one in all_of.items()
    }


def other_dimensions(entry: Entry, asked: int, fit: Sequence[str]) -> NetworkUnfit:
    """Return the error of a network that reads input of another number of dimensions.

    Args:
        entry: the network.
        asked: dimensions of the input, 2 or 3.
        fit: names of networks to choose instead.
    """
    return NetworkUnfit(
        f"The network '{entry.name}' reads input of {entry.dimensions} dimensions, "
        f"and input.dimensions is {asked}.",
        remedy=choose(fit),
    )


def choose(fit: Sequence[str]) -> str:
    """The remedy that names the networks to choose from."""
    return f"Choose one of: {', '.join(fit)}." if fit else "No network does all that is asked for."


def registered(name: str) -> Entry:
    """The registry's entry.

    Raises:
        NetworkUnfit: there is none, with the name most like it.
    """
    entry = REGISTRY.get(name)
    if entry is None:
        raise NetworkUnfit(f"There is no network '{name}'.", remedy=nearest(name, REGISTRY))
    return entry


def _small_cnn(
    outputs: int, in_channels: int, arguments: Mapping[str, Any], _: Path | None
) -> nn.Module:
    from cloister_fl.networks.small_cnn import SmallCNN

    return SmallCNN(outputs, in_channels, width=arguments["width"])


def _small_cnn_3d(
    outputs: int, in_channels: int, arguments: Mapping[str, Any], _: Path | None
) -> nn.Module:
    from cloister_fl.networks.small_cnn import SmallCNN3D

    return SmallCNN3D(outputs, in_channels, width=arguments["width"])


def _unet(
    outputs: int, in_channels: int, arguments: Mapping[str, Any], _: Path | None
) -> nn.Module:
    from cloister_fl.networks.unet import UNet

    return UNet(outputs, in_channels, width=arguments["width"])


def _filter_bank(
    outputs: int, in_channels: int, arguments: Mapping[str, Any], _: Path | None
) -> nn.Module:
    from cloister_fl.networks.filter_bank import FilterBank

    _refuse_head("filter-bank", outputs, in_channels)
    return FilterBank(outputs, width=arguments["width"])


def _resnet18(
    outputs: int, in_channels: int, arguments: Mapping[str, Any], _: Path | None
) -> nn.Module:
    nets = _monai_nets()
    from monai.networks.nets.resnet import ResNetBlock

    class Block(ResNetBlock):  # type: ignore[misc]  # MONAI is not typed
        """MONAI's basic block, which adds the shortcut in place and so breaks Opacus' hooks."""

        def forward(self, x: Tensor) -> Tensor:
            shortcut = x if self.downsample is None else self.downsample(x)
            out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
            result: Tensor = self.act(out + shortcut)
            return result

    module: nn.Module = nets.ResNet(
        block=Block,
        layers=[2, 2, 2, 2],
        block_inplanes=[64, 128, 256, 512],
        spatial_dims=2,
        n_input_channels=in_channels,
        conv1_t_stride=2,
        num_classes=outputs,
    )
    return _without_batch_statistics(module, arguments["groups"])


def _densenet121(
    outputs: int, in_channels: int, arguments: Mapping[str, Any], _: Path | None
) -> nn.Module:
    module: nn.Module = _monai_nets().DenseNet121(
        spatial_dims=2, in_channels=in_channels, out_channels=outputs, pretrained=False
    )
    return _without_batch_statistics(module, arguments["groups"])


def _lite0(
    outputs: int, in_channels: int, arguments: Mapping[str, Any], models: Path | None
) -> nn.Module:
    weights = Weights("efficientnet-lite0", arguments["weights"], packaged=True, models=models)
    return _frozen("efficientnet-lite0", weights, outputs, in_channels)


def _local(
    outputs: int, in_channels: int, arguments: Mapping[str, Any], models: Path | None
) -> nn.Module:
    weights = Weights(arguments["architecture"], arguments["sha256"], models=models)
    return _frozen("frozen-backbone", weights, outputs, in_channels)


def _refuse_head(name: str, outputs: int, in_channels: int) -> None:
    """Refuse what a head cannot give that has a logit less than there are classes."""
    if outputs < 2 or in_channels != 1:
        raise NetworkUnfit(
            f"The network '{name}' reads one channel and gives two outputs or more, and is asked "
            f"for {in_channels} and {outputs}.",
            remedy="Choose another network, such as small-cnn.",
        )


def _frozen(name: str, weights: Weights, outputs: int, in_channels: int) -> nn.Module:
    from cloister_fl.networks.frozen_backbone import FrozenBackbone

    _refuse_head(name, outputs, in_channels)
    return FrozenBackbone(weights, outputs)


def _without_batch_statistics(module: nn.Module, groups: int) -> nn.Module:
    """Put GroupNorm in the place of BatchNorm and take in-place work out.

    MONAI's own ``norm`` and ``act`` arguments do not reach the blocks of its ResNet.
    """
    from torch import nn

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(groups, child.num_features))
            elif isinstance(child, nn.ReLU):
                child.inplace = False
    return module


_GROUPS = {
    "groups": Argument(32, 1, 32, divides=32)  # groups of each GroupNorm layer
}

REGISTRY: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        # Four convolutions, 16,000 weights at the default width: for a laptop.
        Entry(
            name="small-cnn",
            smallest=16,
            arguments={
                "width": Argument(12, 4, 64, multiple=4),  # channels of the first layer
            },
            builder=_small_cnn,
        ),
        # Four convolutions of volumes, 102,000 weights at the default width.
        Entry(
            name="small-cnn-3d",
            smallest=16,
            arguments={
                "width": Argument(12, 4, 32, multiple=4),  # channels of the first layer
            },
            builder=_small_cnn_3d,
            dimensions=3,
        ),
        # U-Net of four levels, 122,000 weights at the default width: to segment.
        Entry(
            name="unet",
            smallest=16,
            arguments={
                "width": Argument(8, 4, 64, multiple=4),  # channels of the first level
            },
            builder=_unet,
            answers="pixel",
        ),
        # Fixed oriented filters, 500 weights on top: for little data and privacy.
        Entry(
            name="filter-bank",
            smallest=32,
            arguments={
                "width": Argument(32, 4, 256, multiple=4),  # channels of the hidden layer
            },
            builder=_filter_bank,
            fewest_outputs=2,
        ),
        # Frozen EfficientNet-Lite0 (ImageNet) under a linear head: where to start.
        Entry(
            name="efficientnet-lite0",
            smallest=32,
            arguments={
                "weights": Word(
                    choices=(PINNED["efficientnet-lite0"],),
                    default=PINNED["efficientnet-lite0"],
                ),
            },
            builder=_lite0,
            fewest_outputs=2,
        ),
        # A linear head on frozen weights of your own, named by their SHA-256.
        Entry(
            name="frozen-backbone",
            smallest=32,
            arguments={
                "architecture": Word(choices=tuple(WIDTHS)),
                "sha256": Word(),  # of the safetensors file
            },
            builder=_local,
            fewest_outputs=2,
        ),
        # ResNet-18 (He et al. 2016) with GroupNorm, 11 million weights.
        Entry(
            name="resnet18",
            smallest=32,
            arguments=_GROUPS,
            builder=_resnet18,
        ),
        # DenseNet-121 (Huang et al. 2017) with GroupNorm, 7 million weights.
        Entry(
            name="densenet121",
            smallest=32,
            arguments=_GROUPS,
            builder=_densenet121,
        ),
    )
}
"""The networks by name."""
