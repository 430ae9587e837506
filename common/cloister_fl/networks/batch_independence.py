"""Check that no patient's output of a network depends on another patient's image."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

from cloister_fl.errors import NetworkUnfit
from cloister_fl.networks.flat_parameters import form_of
from cloister_fl.networks.spec import missing_package
from cloister_fl.system import arguments
from cloister_fl.system.libraries.imports import undisturbed_imports

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_LARGEST = 1 << 13


def require_private(
    module: nn.Module, *, size: int = 64, depth: int | None = None, in_channels: int = 1
) -> None:
    """Refuse a module whose output for one image depends on another image or on earlier data.

    Opacus' validator looks at the types of trainable layers, so it passes a module that mixes a
    batch by arithmetic, and batch norm without weights. Here every layer is looked at; the
    gradient of each image's output by every other image must be exactly zero; and the output
    itself must stay the same, bit by bit, whatever the others are, in batches of several sizes,
    and whatever went through the network before. No weight is zero while this is tried, for a zero
    may hide a leak. A site calls this before it charges a round; what has passed in this process
    is not looked at again.

    It finds mistakes. It is no proof against whoever writes a network to deceive it: the code of a
    registry's networks is read and installed at the site, and never travels.

    Args:
        module: in training mode.
        size: side of the input in pixels.
        depth: slices of a volume; None for images.
        in_channels: channels of the input.

    Raises:
        NetworkUnfit: naming the layer, or the leak.
        ExtraMissing: Opacus is not installed.
        OptionInvalid: an argument is not what is described here.
    """
    from torch import nn

    arguments.of_type("module", module, nn.Module, "Give a module of torch.")
    size = arguments.whole("size", size, 1, _LARGEST)
    depth = None if depth is None else arguments.whole("depth", depth, 1, _LARGEST)
    in_channels = arguments.whole("in_channels", in_channels, 1, _LARGEST)
    key = (form_of(module), size, depth, in_channels)
    if key in _proved:
        return
    _refuse_layers(module)
    with undisturbed_imports(), warnings.catch_warnings():
        # Opacus' dependencies announce deprecations on import; none of them is about our module.
        warnings.simplefilter("ignore")
        try:
            from opacus.validators import ModuleValidator
        except ImportError:
            raise missing_package("opacus") from None
    faults = ModuleValidator.validate(module, strict=False)
    if faults:
        names = ", ".join(sorted({type(fault).__name__ for fault in faults}))
        raise NetworkUnfit(
            "Opacus refuses the network.",
            why=f"Its validator reports: {names}.",
            remedy="Use layers that treat each image by itself, and training mode.",
        )
    places = (size, size) if depth is None else (depth, size, size)
    _refuse_leak(module, (in_channels, *places))
    _proved.add(key)


_proved: set[tuple[object, ...]] = set()

_COUNTS = (2, 3, 5)
"""Images in a batch that is tried."""


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


def _refuse_leak(module: nn.Module, one: tuple[int, ...]) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, *one), generator=generator).requires_grad_()
    # Behind a weight that begins at zero, every gradient is zero, and proves nothing.
    module = copy.deepcopy(module)
    for weight in module.parameters():
        drawn = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        weight.data.copy_(torch.where(weight.detach() == 0, drawn, weight.detach()))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            outputs: Tensor = module(images)
        except (RuntimeError, ValueError, TypeError):
            raise NetworkUnfit(
                f"The network does not take images of {' x '.join(map(str, one))}.",
                remedy="Give the size, depth and channels that it is made for, or another network.",
            ) from None
        if outputs.shape[:1] != images.shape[:1]:
            raise NetworkUnfit("The network does not give one row of outputs for each image.")
        for index in range(len(images)):
            (gradient,) = torch.autograd.grad(outputs[index].sum(), images, retain_graph=True)
            if bool((gradient[1 - index] != 0).any()) or not bool(torch.isfinite(gradient).all()):
                raise _mixes("on another image")
    _refuse_change(module, one, generator)


def _refuse_change(module: nn.Module, one: tuple[int, ...], generator: torch.Generator) -> None:
    """Refuse a module whose output for an image is another one beside other images."""
    import torch

    def outputs(images: Tensor) -> Tensor:
        # As often as a layer asks, the same random numbers: dropout is no leak.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            result: Tensor = module(images)
            return result

    for count in _COUNTS:
        images = torch.randn((count, *one), generator=generator)
        first = outputs(images)
        if not torch.equal(outputs(images), first):
            raise _mixes("on images that came before")
        for others in (-3 * images, torch.zeros_like(images), 100 * images + 1):
            for place in (0, count - 1):
                beside = others.clone()
                beside[place] = images[place]
                if not torch.equal(outputs(beside)[place], first[place]):
                    raise _mixes("on another image")


def _mixes(told: str) -> NetworkUnfit:
    return NetworkUnfit(
        f"The network's output for one image depends {told}.",
        why="Clipping bounds one patient's gradient only where patients do not mix.",
        remedy="Use a network of the registry.",
    )
