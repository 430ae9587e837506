"""What `flower` and `tls_listener` use that is not promised; fails when a pin moves."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from typing import Any

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


def _require_same(shape: Any, message: Any) -> set[int]:
    """Hold a shape against a protobuf descriptor; the fields that it leaves out."""
    from google.protobuf.descriptor import FieldDescriptor

    for number, expected in shape.items():
        nested = message.fields_by_number[number].message_type
        if isinstance(expected, dict):
            assert _require_same(expected, nested) <= ({1} if not expected else set())
        elif nested is not None:
            assert {field.number: field.name for field in nested.fields} == {
                1: "object_id",
                2: "children",
            }
        else:
            double = message.fields_by_number[number].type == FieldDescriptor.TYPE_DOUBLE
            assert isinstance(expected, int | re.Pattern) != double
    return {field.number for field in message.fields} - set(shape)


def test_the_shapes_of_requests_are_those_of_flower_s_messages() -> None:
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    from cloister_fl.server.flower.superlink import NODE_PATHS, PUSH_MESSAGES
    from cloister_fl.server.network import request_shape

    assert set(request_shape.SHAPES) == NODE_PATHS
    assert request_shape.PUSH_MESSAGES == PUSH_MESSAGES
    for path, shape in request_shape.SHAPES.items():
        left_out = _require_same(shape, PROTOBUF_REQUEST_TYPES["POST", path].DESCRIPTOR)
        assert left_out == ({2} if path == "/v1/fleet/pull-messages" else set()), path


def test_a_piece_of_an_array_is_as_large_as_the_gate_takes_it_to_be() -> None:
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    from flwr.supercore.constant import FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES

    from cloister_fl.server.network import request_shape, request_turns

    assert FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE == request_shape.PIECE_BYTES
    wide = request_turns.WIDE[request_shape.PUSH_OBJECT]
    assert wide >= FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES


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
