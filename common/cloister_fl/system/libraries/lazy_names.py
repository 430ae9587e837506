"""Names of a package that are imported when they are first asked for (PEP 562).

A package says what is public in its ``__init__``, and importing that package must not import
torch: ``cloister --help`` would wait for it. So an ``__init__`` lists its names twice, for the type
checker in imports under ``TYPE_CHECKING``, and with the module of each for ``lazy_names``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module

from cloister_fl.errors import ExtraMissing
from cloister_fl.system.installation import install_command


def lazy_names(
    package: str, homes: Mapping[str, str], *, extra: str
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and the ``__dir__`` of a package.

    The first raises ``AttributeError`` for a name that is not public, and ``ExtraMissing`` where
    something is not installed.

    Args:
        package: its dotted name.
        homes: by public name, where it is: ``module:name`` with a module of the package.
        extra: what has all that the modules import.
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        module, _, inner = homes[name].partition(":")
        try:
            value: object = getattr(import_module(f"{package}.{module}"), inner)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in ("", package.partition(".")[0]):
                raise
            raise ExtraMissing(
                f"{package}.{name} needs {missing}, which is not installed.",
                remedy=f"Run: {install_command(extra)}",
            ) from None
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
