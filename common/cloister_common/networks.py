"""The registry of networks: what a study may name, and what makes a network fit for privacy.

Code never travels, so a study names one of these. Each is built without batch statistics, without
in-place operations and without buffers, from its seed alone. ``require_private`` proves for a given
network what the registry promises: no patient's output depends on another patient's image.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cloister_common.errors import ExtraMissing, NetworkUnfit
from cloister_common.study import Network

if TYPE_CHECKING:
    from torch import Tensor, nn

Builder = Callable[[int, int, Mapping[str, int]], "nn.Module"]


@dataclass(frozen=True)
class Argument:
    """A whole-number argument of a network.

    Attributes:
        default: value where the study names none.
        low, high: smallest and largest value.
        multiple: the value must be a multiple of this.
        divides: the value must divide this; 0 for no such rule.
        meaning: one sentence for the person who writes a study.
    """

    default: int
    low: int
    high: int
    meaning: str
    multiple: int = 1
    divides: int = 0

    @property
    def range(self) -> str:
        step = f", in steps of {self.multiple}" if self.multiple > 1 else ""
        divisor = f", a divisor of {self.divides}" if self.divides else ""
        return f"a whole number from {self.low} to {self.high}{step}{divisor}"

    def accepts(self, value: object) -> bool:
        # bool is an int to Python, not to a reader.
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        if not self.low <= value <= self.high or value % self.multiple:
            return False
        return not self.divides or self.divides % value == 0


@dataclass(frozen=True)
class Entry:
    """A network of the registry.

    Attributes:
        name: what a study writes.
        summary: one sentence for the person who chooses.
        smallest: smallest side of the input, in pixels.
        needs: package beside torch that builds it; empty for none.
        arguments: arguments by name.
        builder: makes it from (outputs, input channels, arguments).
    """

    name: str
    summary: str
    smallest: int
    needs: str
    builder: Builder = field(repr=False)
    arguments: Mapping[str, Argument] = field(default_factory=dict)


def build(
    network: Network, outputs: int, in_channels: int = 1, *, size: int, seed: int
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

    Returns:
        A module in training mode: (batch, in_channels, size, size) to (batch, outputs) logits.

    Raises:
        NetworkUnfit: the network or an argument is unknown, or the input is too small.
        ExtraMissing: the network needs a package that is not installed.
    """
    entry, arguments = resolve(network, size=size)
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = entry.builder(outputs, in_channels, arguments)
    return module.train()


def resolve(network: Network, *, size: int) -> tuple[Entry, dict[str, int]]:
    """Look a network up and fill in its defaults, without importing torch.

    Raises:
        NetworkUnfit: as ``build``.
    """
    entry = REGISTRY.get(network.name)
    if entry is None:
        raise NetworkUnfit(
            f"There is no network '{network.name}'.", remedy=_nearest(network.name, REGISTRY)
        )
    for name, value in network.arguments.items():
        argument = entry.arguments.get(name)
        if argument is None:
            raise NetworkUnfit(
                f"The network '{entry.name}' has no argument '{name}'.",
                remedy=_nearest(name, entry.arguments),
            )
        if not argument.accepts(value):
            raise NetworkUnfit(
                f"The argument '{name}' of '{entry.name}' cannot be {value!r}.",
                remedy=f"It is {argument.range}.",
            )
    if size < entry.smallest:
        raise NetworkUnfit(
            f"Images of {size} pixels are too small for '{entry.name}'.",
            remedy=f"Set input.size to {entry.smallest} or more, or choose another network.",
        )
    defaults = {name: argument.default for name, argument in entry.arguments.items()}
    given = {name: int(value) for name, value in network.arguments.items()}
    return entry, defaults | given


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Known: {', '.join(known)}." if known else "It takes no arguments."


def require_private(module: nn.Module, *, size: int = 64, in_channels: int = 1) -> None:
    """Refuse a module whose output for one image depends on another image or on earlier data.

    Opacus' validator looks at the types of trainable layers, so it passes a module that mixes a
    batch by arithmetic, and batch norm without weights. Here every layer is looked at, and the
    gradient of each image's output by every other image must be exactly zero. A site calls this
    before it charges a round; what has passed in this process is not looked at again.

    Args:
        module: in training mode.
        size: side of the input in pixels.
        in_channels: channels of the input.

    Raises:
        NetworkUnfit: naming the layer, or the leak.
        ExtraMissing: Opacus is not installed.
    """
    key = (type(module), repr(module), module.training, size, in_channels)
    if key in _proved:
        return
    _refuse_layers(module)
    with warnings.catch_warnings():
        # Opacus' dependencies announce deprecations on import; none of them is about our module.
        warnings.simplefilter("ignore")
        try:
            from opacus.validators import ModuleValidator
        except ImportError:
            raise _missing("opacus") from None
    faults = ModuleValidator.validate(module, strict=False)
    if faults:
        names = ", ".join(sorted({type(fault).__name__ for fault in faults}))
        raise NetworkUnfit(
            "Opacus refuses the network.",
            why=f"Its validator reports: {names}.",
            remedy="Use layers that treat each image by itself, and training mode.",
        )
    _refuse_leak(module, size, in_channels)
    _proved.add(key)


_proved: set[tuple[object, ...]] = set()


def _refuse_layers(module: nn.Module) -> None:
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.instancenorm import _InstanceNorm

    for name, layer in module.named_modules():
        where = f"The layer '{name or 'network'}' ({type(layer).__name__})"
        # Instance norm is sound without running statistics.
        if isinstance(layer, _InstanceNorm):
            if layer.track_running_stats:
                raise NetworkUnfit(
                    f"{where} keeps running statistics of the images.",
                    remedy="Use GroupNorm, or InstanceNorm with track_running_stats=False.",
                )
        elif isinstance(layer, _BatchNorm):
            raise NetworkUnfit(f"{where} mixes the images of a batch.", remedy="Use GroupNorm.")
        if getattr(layer, "inplace", False):
            raise NetworkUnfit(
                f"{where} works in place, which hides activations from Opacus.",
                remedy="Set inplace=False.",
            )
    for name, _ in module.named_buffers():
        raise NetworkUnfit(
            f"The network has a buffer, '{name}'.",
            why="Buffers are updated outside the clipped and noised gradient.",
            remedy="Use layers without buffers.",
        )


def _refuse_leak(module: nn.Module, size: int, in_channels: int) -> None:
    import torch

    images = torch.randn(
        (2, in_channels, size, size), generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        outputs: Tensor = module(images)
        if outputs.shape[:1] != images.shape[:1]:
            raise NetworkUnfit("The network does not give one row of outputs for each image.")
        for index in range(len(images)):
            (gradient,) = torch.autograd.grad(outputs[index].sum(), images, retain_graph=True)
            if bool((gradient[1 - index] != 0).any()) or not bool(torch.isfinite(gradient).all()):
                raise NetworkUnfit(
                    "The network's output for one image depends on another image.",
                    why="Clipping bounds one patient's gradient only where patients do not mix.",
                    remedy="Use a network of the registry.",
                )


def _missing(package: str) -> ExtraMissing:
    return ExtraMissing(
        f"The package '{package}' is not installed.",
        remedy='Install it with: pip install "cloister[client]"',
    )


def _monai_nets() -> Any:
    with warnings.catch_warnings():
        # MONAI probes for optional packages on import and warns of each that is old or absent.
        warnings.simplefilter("ignore")
        try:
            from monai.networks import nets
        except ImportError:
            raise _missing("monai") from None
    return nets


def _small_cnn(outputs: int, in_channels: int, arguments: Mapping[str, int]) -> nn.Module:
    from cloister_common.small_cnn import SmallCNN

    return SmallCNN(outputs, in_channels, width=arguments["width"])


def _filter_bank(outputs: int, in_channels: int, arguments: Mapping[str, int]) -> nn.Module:
    from cloister_common.filter_bank import FilterBank

    if outputs < 2 or in_channels != 1:
        raise NetworkUnfit("The network 'filter-bank' needs one channel and two classes or more.")
    return FilterBank(outputs, width=arguments["width"])


def _resnet18(outputs: int, in_channels: int, arguments: Mapping[str, int]) -> nn.Module:
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


def _densenet121(outputs: int, in_channels: int, arguments: Mapping[str, int]) -> nn.Module:
    module: nn.Module = _monai_nets().DenseNet121(
        spatial_dims=2, in_channels=in_channels, out_channels=outputs, pretrained=False
    )
    return _without_batch_statistics(module, arguments["groups"])


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
    "groups": Argument(32, 1, 32, "Groups of each GroupNorm layer; a divisor of 32.", divides=32)
}

REGISTRY: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="small-cnn",
            summary="Four convolutions, 16,000 weights at the default width: for a laptop.",
            smallest=16,
            needs="",
            arguments={
                "width": Argument(12, 4, 64, "Channels of the first layer.", multiple=4),
            },
            builder=_small_cnn,
        ),
        Entry(
            name="filter-bank",
            summary="Fixed oriented filters, 500 weights on top: for little data and privacy.",
            smallest=32,
            needs="",
            arguments={
                "width": Argument(32, 4, 256, "Channels of the hidden layer.", multiple=4),
            },
            builder=_filter_bank,
        ),
        Entry(
            name="resnet18",
            summary="ResNet-18 (He et al. 2016) with GroupNorm, 11 million weights.",
            smallest=32,
            needs="monai",
            arguments=_GROUPS,
            builder=_resnet18,
        ),
        Entry(
            name="densenet121",
            summary="DenseNet-121 (Huang et al. 2017) with GroupNorm, 7 million weights.",
            smallest=32,
            needs="monai",
            arguments=_GROUPS,
            builder=_densenet121,
        ),
    )
}
"""The networks by name."""
