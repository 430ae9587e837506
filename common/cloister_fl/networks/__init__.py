"""Networks, losses, and the checks that keep patients apart.

A study names a network of ``REGISTRY`` and its arguments; code never travels. ``build`` makes one
by itself, for a look at it or for training of your own; that of a study is built by
``study.build_network``. Each is proved to treat every image by itself (``require_private``), as
differential privacy for patients needs it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister_fl.networks.batch_independence import require_private
    from cloister_fl.networks.registry import REGISTRY, build
    from cloister_fl.networks.spec import Argument, Choice, Entry, NetworkChoice, Word
else:
    from cloister_fl.system.libraries.lazy_names import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Argument": "spec:Argument",
            "Choice": "spec:Choice",
            "Entry": "spec:Entry",
            "NetworkChoice": "spec:NetworkChoice",
            "REGISTRY": "registry:REGISTRY",
            "Word": "spec:Word",
            "build": "registry:build",
            "require_private": "batch_independence:require_private",
        },
        extra="client",
    )

__all__ = [
    "REGISTRY",
    "Argument",
    "Choice",
    "Entry",
    "NetworkChoice",
    "Word",
    "build",
    "require_private",
]
