"""Flower's SuperLink, embedded: its application and its state, without its listeners.

Pinned to flwr 1.41.0. Since 1.40 Fleet, Control and Runtime share one application, and Control
has no authentication of its own, so the application is never bound to a port here: ``fleet_gate``
stands before it. A private token guards Control, a secret guards Runtime.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime
import hmac
import logging
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alembic.util import CommandError
from flwr.app import Error, Message
from flwr.common.constant import (
    ACCESS_TOKEN_KEY,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    TRANSPORT_TYPE_GRPC_RERE,
    ErrorCode,
    Status,
)
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.server.superlink.linkstate import sql_linkstate
from flwr.server.superlink.linkstate.utils import (
    convert_sint64_values_in_dict_to_uint64,
    dict_to_message,
)
from flwr.supercore.auth.typing import (
    AccountAuthCredentials,
    AccountAuthLoginDetails,
    AccountInfo,
)
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NodeStatus,
)
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.state.schema.corestate_models import (
    ObjectPushSession,
    ObjectPushSessionPending,
    ObjectPushSessionRoot,
)
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes, Node
from flwr.supercore.state.schema.objectstore_models import StoredObject
from flwr.supercore.utils import uint64_to_int64
from flwr.superlink.auth_plugin import ControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from google.protobuf.message import DecodeError
from sqlalchemy import delete, select, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

NODE_KEY_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER.encode()
"""The header that says, in base64, which node key signed a request."""

ACTIVATE = "/v1/fleet/activate-node"
"""With this a node comes online."""

CONFIRM = "/v1/fleet/confirm-message-received"
"""With this a node says that it has a whole message, whose objects are then deleted."""

PUSH_MESSAGES = "/v1/fleet/push-messages"

NODE_PATHS = frozenset(
    {
        ACTIVATE,
        PUSH_MESSAGES,
        "/v1/fleet/deactivate-node",
        "/v1/fleet/send-node-heartbeat",
        "/v1/fleet/pull-messages",
        "/v1/fleet/get-run",
        "/v1/fleet/get-fab",
        "/v1/fleet/push-object",
        "/v1/fleet/pull-object",
        CONFIRM,
    }
)
"""What an enrolled node may ask for. Registering itself is not among it."""

LOGGER = "flwr"
"""Flower's logger. It has a handler of its own, which shows what a peer sent."""

_HEARTBEAT_S = 30.0
_STAMP_BYTES = 40
"""Of a time stamp in ISO 8601, which has 32 with microseconds and a zone."""
_LOCKED_S = 5.0


class _Token(ControlAuthnPlugin):
    """Lets whoever shows the one token use Control, and nobody else."""

    def __init__(self, token: str = "") -> None:
        self._token = token.encode()

    def get_login_details(self) -> AccountAuthLoginDetails | None:
        return None

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        shown = dict(metadata).get(ACCESS_TOKEN_KEY, b"")
        given = shown.encode() if isinstance(shown, str) else shown
        if not self._token or not hmac.compare_digest(given, self._token):
            return False, None
        return True, AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)

    def get_auth_tokens(self, device_code: str) -> AccountAuthCredentials | None:
        return None

    def refresh_tokens(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        return None, None


@dataclass(frozen=True)
class Nodes:
    """Flower's list of nodes, kept equal to the approved sites."""

    _factory: Any

    def begins(self, key: bytes) -> None:
        """A node comes online: its last life is over, and nothing it was asked will be answered.

        Flower lets a node come back only when its last life's heartbeats have lapsed, a minute
        after a crash, and answers "unavailable" only if a run looks while it is offline; what was
        delivered to a life that ended unseen would be waited for until the run's own timeout. The
        node's certificate says here that it is the very site that begins anew, so its last life
        is ended, and answered for, at once.

        Args:
            key: the node's public key, PEM.
        """
        state = self._factory.state()
        node = state.get_node_id_by_public_key(key)
        if node is None:
            return
        state.deactivate_node(node)
        with state.session() as session:
            halves = session.scalars(_half_sent_by(node)).all()
        for half in halves:
            state._cleanup_push_session(half, cleanup_messages=True)
        with state.session() as session:
            asked = session.scalars(_unanswered_by(node)).all()
            rows = [sql_linkstate._message_model_to_dict(model) for model in asked]
        for row in rows:
            convert_sint64_values_in_dict_to_uint64(row, ["run_id", "src_node_id", "dst_node_id"])
            message = dict_to_message(row)
            if _finished(state, message.metadata.run_id):
                continue
            reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "node restarted"), reply_to=message)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            state._store_generated_message(reply)
            state.store_message_res(reply)

    def may_confirm(self, key: bytes, body: bytes) -> bool:
        """Whether a node may say that it has received a message.

        Flower deletes whatever object is named, of whomever, whether it has come or not: a message
        that is still being sent is then lost, and with it the call that sends it. A node may name a
        message to itself, all of which is here, and what is not here any more.

        Args:
            key: the node's public key, PEM.
            body: the request, as it came.
        """
        request = ConfirmMessageReceivedRequest()
        try:
            request.ParseFromString(body)
        except DecodeError:
            return False
        state, named = self._factory.state(), request.message_object_id
        node = state.get_node_id_by_public_key(key)
        if node is None or request.node.node_id != node:
            return False
        with state.session() as session:
            if session.scalar(_one_of(StoredObject.object_id, named)) is None:
                return True
            return bool(
                session.scalar(_delivered_to(node, named))
                and not session.scalar(_missing_of(named))
            )

    def shrink(self) -> bool:
        """Give back the disk that finished runs took; False where that must be tried again.

        The pages of what is deleted stay in Flower's file, and its log stays as long as it once
        was. Where no run is under way, no message and no object is of use to anybody.
        """
        state = self._factory.state()
        under_way = (Status.PENDING, Status.STARTING, Status.RUNNING)
        try:
            with state.session() as session:
                for table in (MessageIns, MessageRes, ObjectPushSession):
                    session.execute(delete(table))
                # Only now: behind the first write no run can begin before this is committed.
                if state.get_run_info(statuses=under_way):
                    session.rollback()
                    return True
                state.object_store.clear()
            with contextlib.closing(
                sqlite3.connect(self._factory.database, timeout=_LOCKED_S, isolation_level=None)
            ) as database:
                database.execute("VACUUM")
                (busy, *_) = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except (SQLAlchemyError, sqlite3.Error):
            return False
        return not busy

    def reconcile(
        self,
        approved: Mapping[str, bytes],
        known: Collection[bytes],
        renewed: Mapping[bytes, bytes] = MappingProxyType({}),
    ) -> None:
        """Register what is missing and unregister what is no longer approved.

        A node whose key was renewed stays the node that it was: a run that is under way knows it by
        its id, and the messages to it wait under that.

        Args:
            approved: node key (PEM) by site id.
            known: node keys that this coordinator ever approved, renewed or revoked.
            renewed: by new node key, the one whose place it took.
        """
        state = self._factory.state()
        for name, key in approved.items():
            if key in renewed and state.get_node_id_by_public_key(key) is None:
                self._change_key(renewed[key], key)
            if state.get_node_id_by_public_key(key) is None:
                state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, _HEARTBEAT_S, name=name)
        for key in set(known) - set(approved.values()):
            node = state.get_node_id_by_public_key(key)
            if node is not None:
                state.delete_node(NOOP_FLWR_AID, node)

    def _change_key(self, before: bytes, key: bytes) -> None:
        """Give the node with one key another one, where there is such a node."""
        here = (Node.public_key == before, Node.status != NodeStatus.UNREGISTERED)
        with self._factory.state().session() as session:
            session.execute(update(Node).where(*here).values(public_key=key))


def _half_sent_by(node: int) -> Any:
    """Sessions that were to bring a reply of a node, of which parts are missing."""
    root, reply, part = ObjectPushSessionRoot, MessageRes, ObjectPushSessionPending
    return (
        select(root.session_id)
        .join(reply, reply.message_id == root.root_object_id)
        .where(reply.src_node_id == uint64_to_int64(node))
        .where(root.session_id.in_(select(part.session_id)))
        .distinct()
    )


def _unanswered_by(node: int) -> Any:
    """Messages that were delivered to a node, and not answered."""
    asked = MessageIns
    return select(asked).where(
        asked.dst_node_id == uint64_to_int64(node),
        asked.delivered_at != "",
        asked.message_id.not_in(select(MessageRes.reply_to_message_id)),
    )


def _one_of(column: Any, value: str) -> Any:
    return select(column).where(column == value)


def _delivered_to(node: int, message: str) -> Any:
    """The message of this id, where it was delivered to a node."""
    asked = MessageIns
    return _one_of(asked.message_id, message).where(
        asked.dst_node_id == uint64_to_int64(node), asked.delivered_at != ""
    )


def _missing_of(message: str) -> Any:
    """A part of a message that its sender has not sent yet."""
    root, part = ObjectPushSessionRoot, ObjectPushSessionPending
    return (
        select(part.object_id)
        .join(root, root.session_id == part.session_id)
        .where(root.root_object_id == message)
        .limit(1)
    )


def _finished(state: Any, run_id: int) -> bool:
    status = state.get_run_status({run_id}).get(run_id)
    return status is None or status.status == Status.FINISHED


def build(database: Path, token: str, executor_secret: bytes) -> tuple[Any, Nodes]:
    """Make the whole ASGI application, Fleet, Control and Runtime, and its list of nodes.

    Isolation is ``process``: no ServerApp is started by it. Nothing is installed at run time.

    Args:
        database: Flower's own SQLite file.
        token: what Control asks for as a bearer token.
        executor_secret: what the Runtime API asks for.

    Raises:
        sqlite3.Error: the file is damaged, of another form, or cannot be read or written.
    """
    logging.getLogger(LOGGER).setLevel(logging.WARNING)
    _require_sound(database)
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=False,
        certificates=None,
        superexec_auth_secret=executor_secret,
        authn_plugin=_Token(token),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(database),
        isolation="process",
        runtime_dependency_install=False,
    )
    try:
        app = create_app(config, SuperLinkLifespan)
    except DBAPIError as error:
        raise (error.orig if isinstance(error.orig, sqlite3.Error) else _foreign()) from None
    except (SQLAlchemyError, CommandError, SystemExit):
        raise _foreign() from None
    return app, Nodes(app.state.linkstate_factory)


def _require_sound(database: Path) -> None:
    """Look at Flower's file before Flower does, which ends the process or changes the file."""
    if not database.exists() or not database.stat().st_size:
        return  # It is made.
    address = f"{database.absolute().as_uri()}?mode=rw"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=_LOCKED_S)) as held:
        if held.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("a page is damaged")
        if not held.execute("SELECT 1 FROM alembic_version").fetchone():
            raise _foreign()


def _foreign() -> sqlite3.Error:
    return sqlite3.DatabaseError("not a database of this version of Flower")


def signed(headers: Iterable[tuple[bytes, bytes]], key: bytes) -> bool:
    """True where a request's headers hold the time, signed with a node key, once each.

    Flower checks the same, but parses the whole body first.

    Args:
        headers: names in lower case, with their values.
        key: the node key, PEM.
    """
    given: dict[bytes, list[bytes]] = {TIMESTAMP_HEADER.encode(): []}
    given[FLEET_HTTP_SIGNATURE_HEADER.encode()] = []
    for name, value in headers:
        if name in given:
            given[name].append(value)
    (stamps, signatures) = given.values()
    if len(stamps) != 1 or len(signatures) != 1 or len(stamps[0]) > _STAMP_BYTES:
        return False
    try:
        signature = base64.b64decode(signatures[0], validate=True)
        age = now() - datetime.datetime.fromisoformat(stamps[0].decode("ascii"))
    except (binascii.Error, ValueError, TypeError, OverflowError):
        return False
    latest = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
    if not -SYSTEM_TIME_TOLERANCE < age.total_seconds() < latest:
        return False
    return bool(verify_signature(bytes_to_public_key(key), stamps[0], signature))


def speaks_for_itself(body: bytes) -> bool:
    """True where a push holds one reply, of the node that pushes it, and that reply's tree.

    Flower checks that the key fits the node that the request names, and that a reply's source is
    the node that was asked, but not that these two are the same node. Where a tree is that of
    another object than the reply, Flower takes the reply for a whole one while parts are missing;
    and it takes the tree of each push of the same reply, so one would bring objects without end.
    """
    request = PushMessagesRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        return False
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return False
    metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    own = metadata.src_node_id == request.node.node_id
    return bool(own and metadata.message_id == tree.object_id)
