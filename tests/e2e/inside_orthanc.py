"""Runs alone in an empty network namespace: an Orthanc, and a site that fetches from it.

Orthanc 1.10 listens on all addresses whatever its configuration says, so it is started nowhere
else. Says what happened as one line of JSON; see ``test_orthanc``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch

from cloister_fl.client.data.loading import load_frozen
from cloister_fl.client.dicom.transfer_syntaxes import HTJ2K, TRANSFER_SYNTAXES
from cloister_fl.client.pacs.fetch import fetch, set_secret
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.training.local_training import train_round
from cloister_fl.errors import CloisterError
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.networks.registry import build
from support import studies
from support.dicom import make_dicom, radiograph, uid

PASSWORD = "correct-horse"
HTTP, DICOM, CUTTER = 8042, 4242, 8043
PATIENTS, IMAGES = 12, 2
STUDY = studies.study(
    study={"name": "orthanc"}, training={"rounds": 1, "steps": 1}, privacy={"enabled": False}
)


class Orthanc:
    """One Orthanc; its database outlives a kill."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "orthanc.json").write_text(
            json.dumps(
                {
                    "HttpPort": HTTP,
                    "DicomPort": DICOM,
                    "DicomAet": "ORTHANC",
                    "DicomCheckCalledAet": True,
                    "DicomAlwaysAllowGet": True,
                    "DicomAlwaysAllowFind": True,
                    "StorageDirectory": str(folder / "storage"),
                    "IndexDirectory": str(folder / "storage"),
                    "RemoteAccessAllowed": True,
                    "AuthenticationEnabled": True,
                    "RegisteredUsers": {"research": PASSWORD},
                    "Plugins": ["/usr/share/orthanc/plugins"],
                    "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
                }
            )
        )
        self.start()

    def start(self) -> None:
        self.kill()
        log = (self._folder / "orthanc.log").open("ab")
        self.process = subprocess.Popen(
            ["Orthanc", str(self._folder / "orthanc.json")], stdout=log, stderr=log
        )
        for _ in range(300):
            try:
                if httpx.get(f"http://127.0.0.1:{HTTP}/system", auth=self.auth).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise SystemExit("Orthanc does not come up")

    @property
    def auth(self) -> tuple[str, str]:
        return "research", PASSWORD

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def store(self) -> None:
        # The images have 12 bits, and Orthanc 1.10 does not send HTJ2K by C-GET.
        rows = TRANSFER_SYNTAXES.values()
        syntaxes = sorted(row.uid for row in rows if row.depth == 12 and row.family != HTJ2K)
        with httpx.Client(auth=self.auth, timeout=60) as client:
            for patient in range(PATIENTS):
                for image in range(IMAGES):
                    number = patient * IMAGES + image
                    data = make_dicom(
                        radiograph(number, 96, 80),
                        bits_stored=12,
                        patient_id=f"MRN{patient}",
                        transfer_syntax=syntaxes[number % len(syntaxes)],
                        elements={
                            "SOPInstanceUID": uid("orthanc", number),
                            "StudyInstanceUID": uid("study", patient),
                            "SeriesInstanceUID": uid("series", patient),
                            "StudyDate": "20200615" if patient else "19990101",
                        },
                    )
                    url = f"http://127.0.0.1:{HTTP}/instances"
                    client.post(url, content=data).raise_for_status()


def cutter(after: int) -> None:
    """Pass connections on to Orthanc, and cut each answer after so many bytes."""
    listener = socket.create_server(("127.0.0.1", CUTTER))

    def serve(near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", HTTP)) as far:
            threading.Thread(target=pass_on, args=(near, far, 1 << 40), daemon=True).start()
            pass_on(far, near, after)

    def pass_on(one: socket.socket, other: socket.socket, most: int) -> None:
        while most > 0:
            try:
                data = one.recv(65536)
                other.sendall(data[:most])
            except OSError:
                return
            if not data:
                return
            most -= len(data)

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def site(root: Path, table: str) -> Site:
    made = init_site(root, name="north", policy=Policy(patients_at_most=1_000, min_patients=1))
    made.dicom.mkdir(exist_ok=True)
    head, _, tail = (made.root / "site.toml").read_text().partition("[network]")
    head = head.partition("[data.")[0]
    query = '[data.query]\nmodality = ["DX"]\nstudy_date = "20200101-20201231"\n'
    (made.root / "site.toml").write_text(f"{head}{query}\n{table}\n[network]{tail}")
    lines = [f"MRN{n},{'nodule' if n % 2 else 'normal'}" for n in range(1, PATIENTS)]
    made.labels.write_text("\n".join(["PatientID,finding", *lines]))
    return open_site(root)


def end_of(work: Callable[[], object]) -> str:
    """The code that work ends with, or 'ok'."""
    try:
        work()
    except CloisterError as error:
        told = str(error)
    else:
        return "ok"
    assert "MRN" not in told
    assert "2.25." not in told
    return told[:7]


def kept(one: Site) -> int:
    return len(list(one.store.iterdir())) if one.store.exists() else 0


def main(root: Path) -> dict[str, Any]:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    torch.set_num_threads(1)
    orthanc = Orthanc(root)
    told: dict[str, Any] = {}
    try:
        orthanc.store()
        url = f"http://127.0.0.1:{HTTP}/dicom-web"
        web = '[data.dicomweb]\nurl = "{}"\nauth = "basic"\nuser = "research"\n'
        one = site(root / "web", web.format(url))
        set_secret(one, "wrong")
        told["wrong password"] = end_of(lambda: fetch(one))
        set_secret(one, PASSWORD)

        cutter(12_000)
        cut = site(root / "web", web.format(f"http://127.0.0.1:{CUTTER}/dicom-web"))
        told["truncated"] = end_of(lambda: fetch(cut))

        def killing(done: int, _total: int) -> None:
            if done == 7:
                orthanc.kill()

        one = site(root / "web", web.format(url))
        told["killed"] = end_of(lambda: fetch(one, progress=killing))
        told["kept"] = kept(one)
        orthanc.start()
        resumed = fetch(one)
        told["resumed"] = [resumed.found, resumed.new, resumed.there]

        table = f'[data.cget]\nhost = "127.0.0.1"\nport = {DICOM}\ncalled = "{{}}"\ntls = false\n'
        told["wrong title"] = end_of(lambda: fetch(site(root / "get", table.format("ANOTHER"))))
        two = site(root / "get", table.format("ORTHANC"))
        told["get killed"] = end_of(lambda: fetch(two, progress=killing))
        told["get kept"] = kept(two)
        orthanc.start()
        again = fetch(two)
        told["get resumed"] = [again.found, again.new, again.there]

        cohorts = [load_frozen(each, STUDY) for each in (one, two)]
        told["images"] = [len(cohort.images) for cohort in cohorts]
        marks = [sorted(patient.mark for patient in cohort.patients) for cohort in cohorts]
        told["same"] = marks[0] == marks[1]
        module = build(STUDY.network, 2, 1, size=32, seed=0)
        before = flatten(module)
        delta = train_round(
            module, cohorts[0], STUDY, noise_multiplier=0.0, random=None, round_number=1, steps=1
        )
        told["trained"] = bool(len(delta) == len(before) and abs(delta).max() > 0)
    finally:
        orthanc.kill()
    return told


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))) + "\n")
    sys.stdout.flush()
    os._exit(0)
