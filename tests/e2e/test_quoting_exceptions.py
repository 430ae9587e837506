"""A library that quotes a record number in its exceptions: no byte of it leaves the hospital."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister_fl.study.file import parse_study
from support import deployment
from support.deployment import Deployment

CANARY = "MRN-7741903-Sommer-Anna"
STUDY = deployment.study_text(
    "quoting",
    training={"rounds": 2},
    privacy={"enabled": False},
    aggregation={"min_sites": 3, "colluders": 0},
    evaluation={"site_fraction": 0.3},
)
# Python runs this in every process that finds it; only an executor has the ClientApp's module.
PLANTED = f"""
import importlib.abc, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "cloister_fl.client.app":
            return None
        sys.meta_path.remove(self)
        import importlib.util
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module
        def exec_module(module):
            real(module)
            def quote(*_, **__):
                import logging, warnings
                logging.getLogger("pydicom").error("{CANARY} logged")
                warnings.warn("{CANARY} warned")
                print("{CANARY} printed")
                print("{CANARY} printed", file=sys.stderr)
                raise ValueError("{CANARY} cannot be read")
            # A name that is not there would be planted where nobody comes by.
            getattr(module, os.environ["QUOTE_AT"])
            setattr(module, os.environ["QUOTE_AT"], quote)
        spec.loader.exec_module = exec_module
        return spec

if os.environ.get("QUOTE_AT"):
    sys.meta_path.insert(0, Finder())

if os.environ.get("TEE"):
    from cloister_fl.server.network import fleet_gate as gate
    replay = gate._replay
    async def tee(app, scope, body, receive, send):
        async def both(event):
            with open(os.environ["TEE"], "ab") as file:
                file.write(event.get("body", b""))
            await send(event)
        with open(os.environ["TEE"], "ab") as file:
            file.write(scope["path"].encode() + b"\\n" + body)
        return await replay(app, scope, body, receive, both)
    gate._replay = tee
"""
WHERE = {"eastfield": "load_for_run", "hillcrest": "train_round", "lakeview": "exact_counts"}


def _restart(hospital: deployment.Hospital) -> None:
    hospital.stop()
    hospital.start()


@pytest.fixture
def lent(federation: Deployment) -> Iterator[Deployment]:
    """The federation, which is as it was when the test has ended, however it ends."""
    yield federation
    for hospital in federation.hospitals.values():
        deployment.change_policy(hospital.folder, "metrics", "[]")
    for name in WHERE:
        _restart(federation.hospitals[name])
    federation.server.stop()
    federation.restart_server()
    for hospital in federation.hospitals.values():
        hospital.wait()


@pytest.mark.slow
def test_during_load_train_and_evaluate(
    lent: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = lent
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    for hospital in federation.hospitals.values():
        deployment.change_policy(hospital.folder, "metrics", '["score-histograms"]')
    traffic = tmp_path / "traffic"
    path = deployment.environment()["PYTHONPATH"]
    with monkeypatch.context() as planted:
        planted.setattr(
            deployment,
            "environment",
            lambda: {
                **os.environ,
                "PYTHONPATH": f"{tmp_path}{os.pathsep}{path}",
                "OMP_NUM_THREADS": "1",
            },
        )
        planted.setenv("PYTHONPATH", str(tmp_path))
        planted.setattr("sys.path", [str(tmp_path), *__import__("sys").path])
        planted.setenv("TEE", str(traffic))
        federation.server.stop()
        federation.restart_server()
        planted.delenv("TEE")
        for name, function in WHERE.items():
            planted.setenv("QUOTE_AT", function)
            _restart(federation.hospitals[name])
        planted.delenv("QUOTE_AT")
        run = federation.run(STUDY)
        federation.approve(parse_study(STUDY))
        summary = federation.wait_for_end(run)
    # It went as far as it had to: one site fell out in each of the three.
    assert "eastfield" not in summary["site_names"]
    assert summary["refused"]["eastfield"] == "declined"
    assert summary["refused"]["hillcrest"] == "declined"
    assert traffic.stat().st_size > 100_000
    needle = CANARY.encode()
    looked = [traffic, *federation.base.glob("*.log")]
    looked += [each for each in federation.folder.rglob("*") if each.is_file()]
    for hospital in federation.hospitals.values():
        looked += [
            each
            for each in hospital.folder.rglob("*")
            if each.is_file() and "cache" not in each.parts
        ]
    assert len(looked) > 60
    for file in looked:
        data = file.read_bytes()
        assert needle not in data, file
        assert b"7741903" not in data, file
