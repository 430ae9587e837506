"""The application bundle for Flower, with no code in it.

Flower would send an application's files to every hospital and run them there. What is sent here
is a ``pyproject.toml`` whose components name modules of the installed wheel, and nothing else.
Both sides build the same bytes, and a hospital refuses every other: a bundle with code, and one
of another version of Cloister.
"""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile

from cloister_fl.protocol.round_messages import VERSION as ROUND_VERSION
from cloister_fl.version import __version__

FAB_NAME = "pyproject.toml"
_CONTENT = ".info/CONTENT"
_LONG_AGO = (1980, 1, 1, 0, 0, 0)


@functools.cache
def bundle() -> bytes:
    """The bytes of the bundle, the same on every machine with this version: an uncompressed zip."""
    text = f"""\
[project]
name = "cloister"
version = "{__version__}"
description = "{ROUND_VERSION}"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "cloister"

[tool.flwr.app.components]
serverapp = "cloister_fl.server.app:app"
clientapp = "cloister_fl.client.app:app"
"""
    project = text.encode()
    listing = f"{FAB_NAME},{hashlib.sha256(project).hexdigest()},{len(project) * 8}"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, content in ((FAB_NAME, project), (_CONTENT, listing.encode())):
            entry = zipfile.ZipInfo(name, _LONG_AGO)
            entry.external_attr = 0o644 << 16
            entry.create_system = 3
            file.writestr(entry, content)
    return buffer.getvalue()


@functools.cache
def bundle_hash() -> str:
    """SHA-256 of the bundle, 64 hexadecimal digits; Flower names it so."""
    return hashlib.sha256(bundle()).hexdigest()
