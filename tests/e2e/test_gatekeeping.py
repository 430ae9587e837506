"""What a hospital refuses, and how the coordinator's people and machines learn of it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import stat
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from flwr.app import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cloister_fl.client.admission.approvals import judgements
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.protocol import app_bundle as thin
from cloister_fl.protocol.round_messages import Prepare, Refusal, pack, unpack
from cloister_fl.server.flower import runtime
from cloister_fl.study.file import parse_study
from support.coordinator_process import wait_for
from support.deployment import (
    Deployment,
    alive,
    change_policy,
    children_of,
    cloister,
    descendants,
    study_text,
)

ASKED = {
    "training": {"rounds": 1, "expected_batch": 24},
    "privacy": {"epsilon": 2.0},
    "aggregation": {"min_sites": 5},
}
LONG_AGO = 1_000_000_000
RESULTS = {"metrics.jsonl", "summary.json", "report.html", "model.safetensors"}
RESULTS |= {"last-model.safetensors"}
"""Made to be handed on; they lie in a folder that only its owner can enter."""


def _touched(folder: Path) -> int:
    """How many images were read since their access times were set back."""
    return sum(path.stat().st_atime > LONG_AGO for path in folder.rglob("*.dcm"))


def _set_back(folder: Path) -> None:
    for path in folder.rglob("*.dcm"):
        os.utime(path, (LONG_AGO, path.stat().st_mtime))


@pytest.mark.slow
def test_a_tighter_policy_refuses_before_an_image_is_read(federation: Deployment) -> None:
    text = study_text("too-dear", **ASKED)
    study = parse_study(text)
    strict, other = (federation.hospitals[name] for name in ("northgate", "riverside"))
    for hospital in (strict, other):
        _set_back(hospital.site.dicom)
    change_policy(strict.folder, "max_epsilon_study", "1.0")
    try:
        run = federation.run(text)
        names = [name for name in federation.hospitals if name != "northgate"]
        federation.approve(study, names)
        wait_for(
            lambda: federation.status(run).get("refused") == {"northgate": "policy"},
            120,
            federation.told,
        )
        assert federation.status(run)["state"] == "waiting"
        told = cloister("server", "status", "--dir", federation.folder)
        assert "northgate does not take part: its policy does not allow the study" in told
        assert _touched(other.site.dicom) > 24
        assert _touched(strict.site.dicom) == 0
        reasons = [entry.body.get("why") for entry in entries_of(strict.site)]
        assert "a reason of the closed list: policy" in reasons
    finally:
        # A steward who changes the policy needs nobody's help: the run goes on by itself.
        change_policy(strict.folder, "max_epsilon_study", "8.0")
    federation.approve(study, ["northgate"])
    assert federation.wait_for_end(run)["sites"] == 5


def _foreign(marker: Path) -> bytes:
    """A bundle whose client code would leave a mark."""
    with zipfile.ZipFile(io.BytesIO(thin.bundle())) as file:
        project = file.read("pyproject.toml").decode()
    project = project.replace("cloister_fl.client.app:app", "evil:app")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("pyproject.toml", project)
        file.writestr("evil.py", f"open({str(marker)!r}, 'w').write('ran')\napp = None\n")
    return buffer.getvalue()


@pytest.mark.parametrize("code", [True, False], ids=["with code", "with another hash"])
def test_a_foreign_bundle(
    three: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bool
) -> None:
    import hashlib

    marker = tmp_path / "mark"
    foreign = _foreign(marker) if code else thin.bundle() + b"\0"
    if not code:
        with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
            file.writestr("pyproject.toml", _project())
        foreign = buffer.getvalue()
    monkeypatch.setattr(runtime, "bundle", lambda: foreign)
    monkeypatch.setattr(runtime, "bundle_hash", lambda: hashlib.sha256(foreign).hexdigest())
    place = three.place
    study = parse_study(study_text("foreign", **ASKED))
    with runtime.running(place.socket, place.token(), place.executor_secret()) as (grid, _):
        nodes = list(grid.get_node_ids())
        assert len(nodes) == 3
        task = Prepare(study.canonical(), "run", 3, "", b"", "")
        messages = [
            Message(pack(task), dst_node_id=node, message_type="query.prepare") for node in nodes
        ]
        replies = list(grid.send_and_receive(messages, timeout=60))
    assert len(replies) == 3
    for reply in replies:
        refusal = unpack(reply.content, Refusal)
        assert refusal.reason == "bundle"
        assert refusal.signature
    assert not marker.exists()
    for hospital in three.hospitals.values():
        sent = [entry.body for entry in entries_of(hospital.site) if entry.kind == "sent"]
        assert sent[-1]["why"] == "a reason of the closed list: bundle"
        assert "another application bundle" in hospital.told()
        assert study.digest not in judgements(hospital.site)


def _project() -> str:
    with zipfile.ZipFile(io.BytesIO(thin.bundle())) as file:
        return file.read("pyproject.toml").decode() + "\n# another version\n"


def _health(address: str) -> str:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=2
            )
        except grpc.RpcError:
            return "UNREACHABLE"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def _becomes(address: str, state: str, within: float, told: Deployment) -> float:
    began = time.monotonic()
    wait_for(lambda: _health(address) == state, within, told.told)
    return time.monotonic() - began


@pytest.mark.slow
def test_health_on_both_sides(federation: Deployment) -> None:
    coordinator = federation.place.file.private.health
    hospital = federation.hospitals["lakeview"]
    site = hospital.standing()["health"]
    assert (_health(coordinator), _health(site)) == ("SERVING", "SERVING")
    os.kill(hospital.children()["executor"], signal.SIGKILL)
    _becomes(site, "NOT_SERVING", 10, federation)
    # Exit status 9: not serving.
    assert "not serving" in cloister("client", "status", "--dir", hospital.folder, status=9)
    _becomes(site, "SERVING", 90, federation)
    os.kill(children_of(federation.server.process.pid)["run_executor"], signal.SIGKILL)
    _becomes(coordinator, "NOT_SERVING", 10, federation)
    _becomes(coordinator, "SERVING", 60, federation)
    started = descendants(federation.server.process.pid)
    federation.server.process.kill()
    federation.server.process.wait(10)
    _becomes(coordinator, "UNREACHABLE", 10, federation)
    _becomes(site, "NOT_SERVING", 10, federation)
    wait_for(lambda: not any(alive(pid) for pid in started), 10, federation.told)
    assert "the coordinator does not answer" in cloister(
        "client", "status", "--dir", hospital.folder, status=9
    )
    assert "not running" in cloister("server", "status", "--dir", federation.folder, status=9)
    federation.restart_server()
    _becomes(coordinator, "SERVING", 60, federation)
    for each in federation.hospitals.values():
        _becomes(each.standing()["health"], "SERVING", 90, federation)


def test_secrets_are_nowhere_but_in_their_files(three: Deployment) -> None:
    roots = [three.folder, *(each.folder for each in three.hospitals.values())]
    secrets: dict[Path, bytes] = {}
    for root in roots:
        for path in (root / "keys").iterdir():
            if path.suffix in {".pem", ".key", ".secret", ".token"} and path.name not in {
                "ca.pem", "server.pem", "client.pem",
            }:  # fmt: skip
                secrets[path] = path.read_bytes().strip()
        for path in root.rglob("*"):
            if path.name not in RESULTS:
                assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path
    assert len(secrets) > 18
    needles = {path: _core(secret) for path, secret in secrets.items()}
    processes = [three.server.process.pid, *descendants(three.server.process.pid)]
    for hospital in three.hospitals.values():
        assert hospital.process is not None
        processes += [hospital.process.pid, *descendants(hospital.process.pid)]
    assert len(processes) > 10
    seen = {f"{pid}/{name}": text for pid in processes for name, text in _public(pid)}
    logs = [three.base / "server.log", *three.base.glob("*.log")]
    seen |= {str(path): path.read_bytes() for path in logs}
    for root in roots:
        seen |= {
            str(path): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.suffix in {".jsonl", ".json", ".toml", ".log"}
        }
    for where, text in seen.items():
        for path, needle in needles.items():
            assert needle not in text, (path.name, where)


def _core(secret: bytes) -> bytes:
    """What of a secret would be recognised: a line out of a PEM, else all of it."""
    return secret.splitlines()[1] if secret.startswith(b"-----BEGIN ") else secret


def _public(pid: int) -> Iterator[tuple[str, bytes]]:
    for name in ("cmdline", "environ"):
        with contextlib.suppress(OSError):
            yield name, Path(f"/proc/{pid}/{name}").read_bytes()
