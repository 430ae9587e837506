"""A small DICOMweb archive on loopback that can be told to misbehave, and a site that asks it."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from support.dicom import make_dicom, radiograph, uid

CANARY, SECRET = "CANARYNAME", "s3cret-token"
"""A patient's name in every image, and what an archive may ask for."""
KIND = 'multipart/related; type="application/dicom"; boundary="b0"'


@dataclass
class Archive:
    """A small DICOMweb archive on loopback."""

    instances: dict[tuple[str, str, str], bytes]
    password: str = ""
    token: str = ""
    misbehave: dict[str, Callable[[Handler], None]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    archive: Archive

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        archive, parts = self.archive, urlsplit(self.path)
        archive.asked.append(parts.path)
        said = self.headers.get("Authorization", "")
        archive.heard.append(said)
        wanted = ""
        if archive.password:
            wanted = "Basic " + base64.b64encode(f"research:{archive.password}".encode()).decode()
        if archive.token:
            wanted = f"Bearer {archive.token}"
        if said != wanted:
            self.send_error(401)
            return
        words = parts.path.removeprefix("/dicom-web/").split("/")
        for name, deed in archive.misbehave.items():
            if parts.path.endswith(name):
                deed(self)
                return
        if len(words) == 6:
            data = archive.instances[words[1], words[3], words[5]]
            self.answer(KIND, b"--b0\r\nX: y\r\n\r\n" + data + b"\r\n--b0--\r\n")
            return
        asked = parse_qs(parts.query)
        start, most = int(asked["offset"][0]), int(asked["limit"][0])
        known = sorted({key[: (len(words) + 1) // 2] for key in archive.instances})
        known = [key for key in known if [*key[:-1]] == words[1::2]]
        tags = ("0020000D", "0020000E", "00080018")
        results: list[dict[str, Any]] = [
            {tags[len(key) - 1]: {"Value": [key[-1]]}} for key in known[start : start + most]
        ]
        for result in results:
            if len(words) == 3:
                result["00080060"] = {"Value": ["DX"]}
        self.answer("application/dicom+json", json.dumps(results).encode())

    def answer(self, kind: str, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


def instances(patients: int) -> dict[tuple[str, str, str], bytes]:
    found = {}
    for number in range(patients):
        for image in range(2):
            instance = uid("instance", number, image)
            found[uid("study", number), uid("series", number), instance] = make_dicom(
                radiograph(10 * number + image),
                bits_stored=12,
                patient_id=f"MRN{number}",
                elements={"SOPInstanceUID": instance, "PatientName": CANARY},
            )
    return found


@contextlib.contextmanager
def serving(patients: int = 4) -> Iterator[Archive]:
    """An archive with two images of each patient, while the context lasts."""
    kept = Archive(instances(patients))
    handler = type("Bound", (Handler,), {"archive": kept})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    kept.url = f"http://127.0.0.1:{server.server_port}/dicom-web"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def asking_site(root: Path, url: str, auth: str = "none") -> Site:
    """A site whose images come from the archive at ``url``, with labels of four patients."""
    site = init_site(
        root / "site", name="north", policy=Policy(patients_at_most=1_000, min_patients=1)
    )
    site.dicom.mkdir()
    text = (site.root / "site.toml").read_text()
    user = 'user = "research"\n' if auth == "basic" else ""
    table = f'[data.dicomweb]\nurl = "{url}"\nauth = "{auth}"\n{user}\n[network]'
    (site.root / "site.toml").write_text(text.replace("[network]", table))
    site.labels.write_text(
        "PatientID,finding\n"
        + "".join(f"MRN{n},{'nodule' if n % 2 else 'normal'}\n" for n in range(4))
    )
    return open_site(site.root)


def shut(handler: Handler) -> None:
    """Refuse."""
    handler.send_error(403)
