"""Networks, losses, and the checks that keep patients apart.

A study names a network of ``REGISTRY`` and its arguments; code never travels. ``build`` makes one
by itself, for a look at it or for training of your own; that of a study is built by
``study.build_network``. Each treats every image by itself, as differential privacy for patients
needs it; ``require_private`` proves it::

    from cloister_fl.networks import Choice, build, require_private

    network = build(Choice("small-cnn", {"width": 8}), outputs=2, size=64, seed=0)
    require_private(network, size=64)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister_fl.networks.batch_independence import require_private
    from cloister_fl.networks.registry import REGISTRY, build
    from cloister_fl.networks.spec import Choice, Entry
else:
    from cloister_fl.system.libraries.lazy_names import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Choice": "spec:Choice",
            "Entry": "spec:Entry",
            "REGISTRY": "registry:REGISTRY",
            "build": "registry:build",
            "require_private": "batch_independence:require_private",
        },
        extra="client",
    )

__all__ = ["REGISTRY", "Choice", "Entry", "build", "require_private"]
