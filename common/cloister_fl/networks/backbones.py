"""Architectures of frozen backbones, up to their pooled features, weights unset."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from cloister_fl.networks.spec import missing_package
from cloister_fl.system.libraries.imports import undisturbed_imports

if TYPE_CHECKING:
    from torch import nn


def _monai_nets() -> Any:
    with undisturbed_imports(), warnings.catch_warnings():
        # MONAI probes for optional packages on import and warns of each that is old or absent.
        warnings.simplefilter("ignore")
        try:
            from monai.networks import nets
        except ImportError:
            raise missing_package("monai") from None
    return nets


def backbone_body(architecture: str, channels: int) -> nn.Module:
    """An architecture of ``pretrained.WIDTHS`` up to its pooled features, weights unset.

    Its batch norms are meant to stay in evaluation mode, where they mix no images. Names of
    weights are those of PyTorch's model zoo, but for what ``pretrained`` translates.
    """
    if architecture == "efficientnet-lite0":
        from cloister_fl.networks.efficientnet_lite import EfficientNetLite0

        return EfficientNetLite0(channels)
    nets = _monai_nets()
    module: nn.Module
    if architecture == "densenet121":
        module = nets.DenseNet121(
            spatial_dims=2, in_channels=channels, out_channels=1, pretrained=False
        )
        # ReLU, pool and flatten stay.
        module.class_layers = module.class_layers[:-1]  # type: ignore[index]
        return module
    deep = architecture == "resnet50"
    module = nets.ResNet(
        block="bottleneck" if deep else "basic",
        layers=[3, 4, 6, 3] if deep else [2, 2, 2, 2],
        block_inplanes=[64, 128, 256, 512],
        spatial_dims=2,
        n_input_channels=channels,
        conv1_t_stride=2,
        bias_downsample=False,
        feed_forward=False,
    )
    return module
