"""The way this copy of Cloister was installed, and the command that adds an extra to it.

The distribution called ``cloister`` on the public package index is another project, and whoever
registers ``cloister-fl`` there decides what it holds. So no command names ours by its name: it is
installed from a checkout, or from a wheel that is a file.
"""

from __future__ import annotations

import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cloister_fl.version import __version__

DISTRIBUTION = "cloister-fl"
"""Name of the distribution; the command is ``cloister``."""

WHEEL = f"{DISTRIBUTION.replace('-', '_')}-{__version__}-py3-none-any.whl"
"""File name of this version's wheel."""

_PINS = ("constraints.txt", "constraints-torch.txt")


def install_command(extra: str) -> str:
    """Return the command that adds an extra to this installation, to be pasted into a shell.

    It names a checkout, or the file of a wheel with the constraints that lie beside it. Where
    neither is known or there any more, it names this version's wheel in the current folder.

    Args:
        extra: one extra or several with commas between, such as ``client,server``.
    """
    try:
        return _command(extra)
    except Exception:
        # This is a part of an error's text; odd metadata must not replace that error.
        return _pip(f"{WHEEL}[{extra}]")


def own_entry_points(group: str) -> list[metadata.EntryPoint]:
    """Return the entry points of a group that this distribution offers, and no other's.

    Any package that is installed beside Cloister could offer a command of the same name, or a
    reading of patients' images, and would be loaded in our place.
    """
    return [
        entry
        for entry in metadata.entry_points(group=group)
        if entry.dist is None or entry.dist.name == DISTRIBUTION
    ]


def _command(extra: str) -> str:
    url = json.loads(metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    source = _local(url["url"])
    if source.is_file() and source.suffix == ".whl":
        return _pip(*_pins(source.parent), f"{source}[{extra}]")
    if not (source / "pyproject.toml").is_file():
        return _pip(f"{WHEEL}[{extra}]")
    script = source / "scripts" / "install"
    if script.is_file() and Path(sys.prefix).resolve() == (source / ".venv").resolve():
        return shlex.join([str(script), extra])
    editable = ["-e"] if url["dir_info"].get("editable") else []
    return _pip(*_pins(source), *editable, f"{source}[{extra}]")


def _local(url: str) -> Path:
    """Return the path of a ``file:`` URL.

    Raises:
        ValueError: it is another kind, such as that of a repository.
    """
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ValueError(parts.scheme)
    return Path(unquote(parts.path))


def _pins(folder: Path) -> list[str]:
    there = [folder / name for name in _PINS if (folder / name).is_file()]
    return [word for path in there for word in ("-c", str(path))]


def _pip(*arguments: str) -> str:
    return shlex.join([sys.executable or "python3", "-P", "-m", "pip", "install", *arguments])
