"""The server's socket and its health port, the commands that look at the server, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from typer.testing import CliRunner

from cloister_fl.errors import ServerState, SiteStateInvalid
from cloister_fl.membership.identity import fingerprint
from cloister_fl.server.cli import server_group
from cloister_fl.server.coordinator.site_approval import revoke_site
from cloister_fl.system.local_socket.socket_client import URL, local_client
from support import coordinator_process
from support.coordinator_process import PROTOBUF, Running, wait_for
from support.errors import raises

runner = CliRunner()


def ask(running: Running, path: str, body: bytes, token: str | None = None) -> tuple[int, bytes]:
    headers = {**PROTOBUF, **({"authorization": f"Bearer {token}"} if token else {})}
    at = running.place.socket
    with local_client(at.parent, at.name, 1 << 26) as client:
        response = client.post(f"{URL}{path}", content=body, headers=headers)
        return response.status_code, response.content


def command(running: Running, *arguments: str) -> tuple[int, str]:
    words = [*arguments, "--dir", str(running.place.root)]
    result = runner.invoke(server_group.app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_control_wants_the_token(running: Running) -> None:
    body = ListNodesRequest().SerializeToString()
    token = running.place.token()
    path = "/v1/control/list-nodes"
    assert ask(running, path, body, token)[0] == 200
    for wrong in (None, "", token[:-1], token + "0", "Bearer", "0" * 64):
        assert ask(running, path, body, wrong)[0] == 401


def test_runtime_wants_the_secret(running: Running) -> None:
    body = AcquireTaskRequest().SerializeToString()
    assert ask(running, "/v1/runtime/acquire-task", body)[0] in {401, 403}
    assert ask(running, "/v1/runtime/acquire-task", body, running.place.token())[0] in {401, 403}


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/docs", "/openapi.json", "/health"])
def test_nothing_else_is_there(running: Running, path: str) -> None:
    assert ask(running, path, b"", running.place.token())[0] == 404


def nodes(running: Running) -> set[str]:
    body = ListNodesRequest().SerializeToString()
    status, answer = ask(running, "/v1/control/list-nodes", body, running.place.token())
    assert status == 200
    return {
        node.name
        for node in ListNodesResponse.FromString(answer).nodes_info
        if node.status != "unregistered"
    }


def test_flowers_nodes_are_the_approved_sites(running: Running, tmp_path: Path) -> None:
    coordinator_process.join(running, tmp_path / "west", "west")
    wait_for(lambda: "west" in nodes(running), 5, lambda: str(nodes(running)))
    revoke_site(running.place, "west")
    wait_for(lambda: "west" not in nodes(running), 5, lambda: str(nodes(running)))


def test_the_commands(running: Running, tmp_path: Path) -> None:
    status, output = command(running, "invite", "alpha", "beta")
    assert status == 0
    assert "cloister-invite" not in output  # a secret goes to a file, not to the screen
    told = json.loads(command(running, "sites", "--json")[1])
    assert {"alpha", "beta"} <= {row["name"] for row in told["invited"]}
    east = coordinator_process.join(running, tmp_path / "east", "east")
    print_ = fingerprint(east.site.identity().public)
    east.activate()
    output = command(running, "sites")[1]
    assert print_ in output
    assert "seen 2" in output
    told = json.loads(command(running, "status", "--json")[1])
    assert (told["running"], told["serving"]) == (True, True)
    with raises(SiteStateInvalid):
        command(running, "approve", "nobody", "--fingerprint", print_)
    with raises(SiteStateInvalid):
        command(running, "invite", "east")
    with raises(SiteStateInvalid):
        command(running, "revoke", "nobody")
    assert command(running, "revoke", "beta", "--yes")[0] == 0
    told = json.loads(command(running, "sites", "--json")[1])
    assert "beta" not in {row["name"] for row in told["invited"]}


def test_a_wrong_fingerprint_is_not_approved(running: Running, tmp_path: Path) -> None:
    from cloister_fl.client.network import join

    invite = running.invite("twin")
    site = join.prepare(tmp_path / "twin", invite)
    join.ask(site, invite)
    print_ = fingerprint(site.identity().public)
    with raises(SiteStateInvalid):
        command(running, "approve", "twin", "--fingerprint", print_[:-1] + "x")
    with raises(SiteStateInvalid):
        command(running, "approve", "twin", "--fingerprint", "")
    with pytest.raises(Exception, match="was not compared"):
        command(running, "approve", "twin")
    row = running.row("twin")
    assert row is not None
    assert row.state == "pending"
    assert command(running, "approve", "twin", "--fingerprint", print_.upper())[0] == 0


def test_one_server_a_folder(running: Running) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            coordinator_process.SERVER,
            "start",
            "--dir",
            str(running.place.root),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode != 0
    assert "CLO-808" in done.stdout + done.stderr


@pytest.mark.slow
def test_stop_and_kill(tmp_path: Path) -> None:
    place = coordinator_process.new_coordinator(tmp_path / "fed")
    first = coordinator_process.start(place, tmp_path / "out-1")
    hospital = coordinator_process.join(first, tmp_path / "north", "north")
    node = hospital.activate()
    first.process.send_signal(signal.SIGKILL)
    first.process.wait(10)
    assert json.loads(command(first, "status", "--json")[1])["running"] is False
    second = coordinator_process.start(place, tmp_path / "out-2")
    try:
        # The same site, node and certificate: nothing was lost.
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.proto.node_pb2 import Node

        request = PullMessagesRequest(node=Node(node_id=node))
        assert hospital.post("/v1/fleet/pull-messages", request)[0] == 200
        status, output = command(second, "stop")
        assert status == 0
        assert "has stopped" in output
        assert second.process.wait(5) == 0
    finally:
        second.stop()
    with raises(ServerState):
        command(second, "stop")
