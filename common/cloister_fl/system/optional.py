"""Check for optional packages, without importing them."""

from __future__ import annotations

from importlib.util import find_spec

from cloister_fl.errors import ExtraMissing
from cloister_fl.system.installation import install_command


def require(extra: str, *modules: str) -> None:
    """Raise ``ExtraMissing`` with the command to run if any module is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ExtraMissing(
            f"This command needs {', '.join(missing)}, which is not installed.",
            remedy=f"Run: {install_command(extra)}",
        )
