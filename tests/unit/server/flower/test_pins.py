"""What `flower` and `tls_listener` use that is not promised; fails when a pin moves."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version

import pytest

pytestmark = pytest.mark.process


HEAVY = ("flwr", "uvicorn", "httpx", "cryptography", "grpc", "fastapi", "torch", "sqlalchemy")


def test_flower_is_the_one_that_was_read() -> None:
    assert version("flwr") == "1.41.0"
    from flwr.superlink.config_loader import SuperLinkLifespanConfig

    assert len(fields(SuperLinkLifespanConfig)) == 22
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    from cloister_fl.server.flower.superlink import NODE_PATHS

    fleet = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    # A path that a new release adds is not open before somebody has read it.
    assert fleet - NODE_PATHS == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert fleet >= NODE_PATHS


def test_uvicorn_is_the_one_that_was_read() -> None:
    assert version("uvicorn").startswith("0.49.")
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

    assert "app_state.copy()" in inspect.getsource(H11Protocol.handle_events)
    assert "more_body" in inspect.getsource(RequestResponseCycle.__init__)
    from uvicorn.server import Server

    # Without it the socket's own backlog is replaced.
    assert "sock=sock, ssl=config.ssl, backlog=config.backlog" in inspect.getsource(Server.startup)


def test_the_command_groups_import_nothing_heavy() -> None:
    code = (
        "import sys, cloister_fl.server.cli.server_group, cloister_fl.client.cli.client_group;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
