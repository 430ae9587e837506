"""Another account of the same machine, which wants to stand where a process of ours stands.

The node of a site and its executor, and the coordinator's server and its run executor, speak over
UNIX sockets. These tests play the account that binds first, plants a link, speaks, or sends too
much; and the message that would have the site sign as another hospital's node.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _insert_message

from cloister_fl.client.flower import executor as executing
from cloister_fl.client.flower.executor import Executor
from cloister_fl.client.flower.names import RUN, SOCKET, SUPEREXEC_SECRET
from cloister_fl.client.flower.node import NodeState, serve_runtime
from cloister_fl.client.flower.own_node import NODE_ID, note_own_node
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.errors import FileUnreadable, LocalSocketRefused, MessageInvalid
from cloister_fl.protocol.app_bundle import bundle, bundle_hash
from cloister_fl.system.files import create_secret, make_private_dir, read_secret
from cloister_fl.system.local_socket.socket_client import URL, local_client
from cloister_fl.system.local_socket.socket_file import connect, is_own, listen
from cloister_fl.system.local_socket.socket_server import OwnUserHttp, RequestLimits
from support.errors import raises

NAME = "some.socket"
LIMIT = 1000
NOBODY = 65534
OWN, OTHER, RUN_ID, SERIES = 5, 6, 7, 8

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_private_dir(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every account can find, as a site's below /var/lib."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        Path(made).chmod(0o755)
        make_private_dir(Path(made) / "run")
        yield Path(made) / "run"


def forked() -> int:
    """Fork as ``os.fork`` does, also where a server of ours runs in a thread."""
    with warnings.catch_warnings():
        # Of a child that runs on: these end after a few system calls.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def as_nobody(act: Callable[[], object]) -> str:
    """Do something in a process of another account; the name of what it raised, or nothing."""
    reading, writing = os.pipe()
    child = forked()
    if child == 0:
        told = ""
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            act()
        except BaseException as error:
            told = type(error).__name__
        os.write(writing, told.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        told = file.read()
    os.waitpid(child, 0)
    return told


class Served:
    """A server of ours on a socket, in a thread, and what its application was given."""

    def __init__(self, folder: Path, answer: Callable[[], tuple[int, list[Any], bytes]]) -> None:
        self.given: list[bytes] = []
        self._answer = answer
        self._bound = listen(folder, NAME)
        limits = RequestLimits(self._app, {"/ask": LIMIT}.get)
        config = uvicorn.Config(
            limits, http=OwnUserHttp, ws="none", loop="asyncio", interface="asgi3",
            lifespan="off", log_config=None, access_log=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._bound],))

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        self.given.append(body)
        status, headers, told = self._answer()
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": told})

    def __enter__(self) -> Served:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()


def plain() -> tuple[int, list[Any], bytes]:
    return 200, [], b"yes"


# Binds first


def test_a_processs_own_socket_answers(folder: Path) -> None:
    with Served(folder, plain) as served, local_client(folder, NAME, LIMIT) as client:
        assert client.post(f"{URL}/ask", content=b"?").content == b"yes"
    assert served.given == [b"?"]
    assert stat.S_IMODE((folder / NAME).lstat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == [NAME]


@as_root
def test_another_account_cannot_bind_in_the_private_folder(open_folder: Path) -> None:
    def binds() -> None:
        with socket.socket(socket.AF_UNIX) as mine:
            mine.bind(str(open_folder / NAME))

    assert as_nobody(binds) == "PermissionError"
    # That is what closes it: where others may write, they can.
    open_folder.chmod(0o777)
    assert as_nobody(binds) == ""


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o711])
def test_an_impostor_that_binds_first_in_a_folder_that_stands_open(folder: Path, mode: int) -> None:
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind(str(folder / NAME))
        impostor.listen()
        folder.chmod(mode)
        with raises(LocalSocketRefused, match=r"can be used by others.*chmod 700"):
            connect(folder, NAME, 1)
        with raises(LocalSocketRefused, match="can be used by others"):
            listen(folder, NAME)
        with local_client(folder, NAME, LIMIT) as client, raises(LocalSocketRefused):
            client.get(f"{URL}/ask")
        impostor.setblocking(False)
        with pytest.raises(BlockingIOError):
            impostor.accept()


@as_root
def test_an_impostor_that_owns_the_folder_or_the_socket(folder: Path) -> None:
    with listen(folder, NAME):
        os.chown(folder / NAME, NOBODY, NOBODY)
        for use in (lambda: connect(folder, NAME, 1), lambda: listen(folder, NAME)):
            with raises(LocalSocketRefused, match="is not a socket of this user"):
                use()
        os.chown(folder / NAME, 0, 0)
        os.chown(folder, NOBODY, NOBODY)
        for use in (lambda: connect(folder, NAME, 1), lambda: listen(folder, NAME)):
            with raises(LocalSocketRefused, match="belongs to another user"):
                use()


@as_root
def test_an_impostor_that_listens_on_our_own_socket(folder: Path) -> None:
    """Whatever the files look like, the kernel says whose process is at the other end."""
    heard, telling = os.pipe()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / NAME))
        child = forked()
        if child == 0:
            os.setuid(NOBODY)
            bound.listen()
            os.write(telling, b"!")
            line, _ = bound.accept()
            os.write(telling, line.recv(100) or b"nothing")
            os._exit(0)
        assert os.read(heard, 1) == b"!"
        with (
            local_client(folder, NAME, LIMIT) as client,
            raises(LocalSocketRefused, match="process of another user"),
        ):
            client.post(f"{URL}/ask", content=b"secret")
        assert os.read(heard, 100) == b"nothing"
        os.waitpid(child, 0)
    os.close(heard)
    os.close(telling)


@as_root
def test_another_account_that_comes_to_the_socket_is_not_answered(open_folder: Path) -> None:
    with Served(open_folder, plain) as served:
        # As if a person had opened both while it ran.
        open_folder.chmod(0o777)
        (open_folder / NAME).chmod(0o666)

        def asks() -> None:
            with socket.socket(socket.AF_UNIX) as line:
                line.connect(str(open_folder / NAME))
                line.sendall(b"GET /ask HTTP/1.1\r\nhost: x\r\n\r\n")
                line.settimeout(10)
                assert line.recv(100), "nothing came"

        assert as_nobody(asks) in {"AssertionError", "ConnectionResetError", "BrokenPipeError"}
        assert served.given == []
        open_folder.chmod(0o700)
        with local_client(open_folder, NAME, LIMIT) as client:
            assert client.post(f"{URL}/ask").content == b"yes"


def test_the_kernels_word_on_who_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = socket.socketpair(socket.AF_UNIX)
    with one, two:
        assert is_own(one)
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        assert not is_own(one)


# What lies in the socket's place


@pytest.mark.process
def test_a_stale_socket_file_after_a_kill(folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path;"
        "from cloister_fl.system.local_socket.socket_file import listen;"
        f"held = listen(Path({str(folder)!r}), {NAME!r});"
        "print('!', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"!\n"
        process.send_signal(signal.SIGKILL)
    assert stat.S_ISSOCK((folder / NAME).lstat().st_mode)
    with local_client(folder, NAME, LIMIT) as client, pytest.raises(httpx.ConnectError):
        client.get(f"{URL}/ask")
    # Killed in the middle of taking the place of another, too.
    socket_left = socket.socket(socket.AF_UNIX)
    socket_left.bind(str(folder / f"{NAME}.new"))
    socket_left.close()
    with Served(folder, plain), local_client(folder, NAME, LIMIT) as client:
        assert client.post(f"{URL}/ask").content == b"yes"
    assert [path.name for path in folder.iterdir()] == [NAME]


@pytest.mark.parametrize("planted", ["link to a socket", "link to nothing", "file", "folder"])
def test_a_socket_path_planted_as_a_symlink_or_something_else(
    folder: Path, tmp_path: Path, planted: str
) -> None:
    place, evil = folder / NAME, tmp_path / "evil"
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind(str(evil))
        impostor.listen()
        match planted:
            case "link to a socket":
                place.symlink_to(evil)
            case "link to nothing":
                place.symlink_to(tmp_path / "nothing")
            case "file":
                place.write_text("kept")
            case "folder":
                place.mkdir()
        for use in (lambda: connect(folder, NAME, 1), lambda: listen(folder, NAME)):
            with raises(LocalSocketRefused, match=r"is not a socket of this user.*Move it away"):
                use()
        impostor.setblocking(False)
        with pytest.raises(BlockingIOError):
            impostor.accept()
    # Nothing was replaced or followed.
    assert not (tmp_path / "nothing").exists()
    assert place.is_symlink() or place.is_dir() or place.read_text() == "kept"


def test_a_folder_that_is_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    with raises(LocalSocketRefused, match="No socket can be made"):
        listen(tmp_path / "link", NAME)
    with listen(folder, NAME), pytest.raises(NotADirectoryError):
        connect(tmp_path / "link", NAME, 1)


def test_an_over_long_path(tmp_path: Path) -> None:
    """A socket's address holds 107 bytes; a hospital's folder may have any length."""
    deep = tmp_path / ("a" * 100) / ("ü" * 100) / "run"
    make_private_dir(deep)
    assert len(os.fsencode(deep / NAME)) > 300
    with Served(deep, plain), local_client(deep, NAME, LIMIT) as client:
        assert client.post(f"{URL}/ask").content == b"yes"


def test_a_socket_that_cannot_be_made_is_an_error_with_a_number(tmp_path: Path) -> None:
    with raises(LocalSocketRefused, match=r"No socket can be made in .*df"):
        listen(tmp_path / "no-such-folder", NAME)


# Sends too much


@pytest.mark.parametrize(
    "how", ["announced", "announced without end", "announced falsely", "in pieces"]
)
def test_a_huge_local_body(folder: Path, how: str) -> None:
    def pieces() -> Iterator[bytes]:
        while True:
            yield b"x" * 300

    with Served(folder, plain) as served, connect(folder, NAME, 10) as line:
        length = {
            # Refused before any of it comes.
            "announced": str(LIMIT + 1),
            "announced without end": "1" + "0" * 15,
            "announced falsely": "-1",
        }.get(how)
        head = f"content-length: {length}" if length else "transfer-encoding: chunked"
        line.sendall(f"POST /ask HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n".encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for number, piece in enumerate(pieces()):
                if how != "in pieces" or number > 20:
                    break
                line.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 4")
        with local_client(folder, NAME, LIMIT) as client:
            assert client.post(f"{URL}/ask", content=b"x" * LIMIT).status_code == 200
            assert client.post(f"{URL}/ask", content=b"x" * (LIMIT + 1)).status_code == 413
            assert client.post(f"{URL}/else", content=b"x").status_code == 404
        assert [len(body) for body in served.given] == [LIMIT]


@pytest.mark.parametrize("how", ["announced", "in pieces", "compressed"])
def test_a_huge_local_answer(folder: Path, how: str) -> None:
    bomb = gzip.compress(b"\0" * 10**7, 9)[: LIMIT // 2]

    def answer() -> tuple[int, list[Any], bytes]:
        if how == "compressed":
            return 200, [(b"content-encoding", b"gzip")], bomb
        size = [(b"content-length", str(LIMIT + 1).encode())] if how == "announced" else []
        return 200, size, b"x" * (LIMIT + 1)

    with (
        Served(folder, answer),
        local_client(folder, NAME, LIMIT) as client,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        client.post(f"{URL}/ask")


# Would have the site sign as another's node


class Gone(Exception):
    """Ends an executor that would ask for ever."""


class Node:
    """A node's state behind the site's socket, with one message for the executor."""

    def __init__(self, site: Site, known_as: int, addressed_to: int) -> None:
        self.state: Any = NodeState(ObjectStoreFactory().store())
        self.state.set_node_id(known_as)
        run = Run.create_empty(RUN_ID)
        run.fab_hash, run.series_id = bundle_hash(), SERIES
        self.state.store_run(run)
        self.state.store_fab(Fab(bundle_hash(), bundle(), {}))
        self.state.set_run_series_context(
            SERIES, Context(RUN_ID, known_as, {}, RecordDict(), {}, series_id=SERIES)
        )
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, 1, 1
        content = RecordDict({"said": ConfigRecord({"word": "question"})})
        asked = Message(content, addressed_to, "train", group_id="1")
        asked.metadata.__dict__["_run_id"] = RUN_ID
        assert self.state.create_task(TaskType.CLIENT_APP, RUN_ID, fab_hash=bundle_hash())
        _insert_message(asked, self.state, self.state.object_store)
        states: Any = NodeStateFactory(ObjectStoreFactory())
        states.state_instance = self.state
        before = set(threading.enumerate())
        self._server = serve_runtime(states, site, read_secret(site.keys / SUPEREXEC_SECRET))
        (self._thread,) = set(threading.enumerate()) - before

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


class App:
    """A ClientApp that notes as whom it would sign."""

    def __init__(self) -> None:
        self.signed_as: list[int] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.signed_as.append(context.node_id)
        return Message(RecordDict(), reply_to=message)


def refuse(message: Message, context: Context, error: Exception) -> Message:
    raise AssertionError


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = init_site(tmp_path / "north", name="north")
    make_private_dir(made.root / RUN)
    create_secret(made.keys / SUPEREXEC_SECRET, b"0" * 64)
    note_own_node(made, OWN)
    return made


@contextlib.contextmanager
def asked(site: Site, known_as: int, addressed_to: int) -> Iterator[tuple[Node, Executor, App]]:
    node, app = Node(site, known_as, addressed_to), App()
    executor = Executor(site, app, refuse)
    try:
        yield node, executor, app
    finally:
        executor._asks.close()
        node.stop()


def test_a_message_for_this_node_is_answered(site: Site) -> None:
    with asked(site, OWN, OWN) as (node, executor, app):
        assert executor.once()
        (reply,) = node.state.get_messages_legacy(is_reply=True)
    assert app.signed_as == [OWN]
    assert reply.metadata.src_node_id == OWN


def test_a_node_that_says_that_it_is_another_hospitals(site: Site) -> None:
    with asked(site, OTHER, OWN) as (_, executor, app):
        assert executor.once()
    assert app.signed_as == [OWN]


def test_a_message_with_another_nodes_id(site: Site) -> None:
    with asked(site, OTHER, OTHER) as (node, executor, app):
        with raises(MessageInvalid, match="another node"):
            executor.once()
        assert node.state.get_messages_legacy(is_reply=True) == []
    assert app.signed_as == []


def test_it_is_told_at_the_site_and_the_executor_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, dict[str, Any]]] = []

    def tell(event: str, **details: Any) -> None:
        told.append((event, details))

    def sleep(_: float) -> None:
        if any(event == "task-refused" for event, _ in told):
            raise Gone

    monkeypatch.setattr(executing, "tell", tell)
    monkeypatch.setattr(executing, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with asked(site, OTHER, OTHER) as (_, executor, app), pytest.raises(Gone):
        executor.forever()
    assert told[-1][1]["code"] == "CLO-502"
    assert app.signed_as == []


@pytest.mark.parametrize("text", ["", "0", "-5", "x", str(1 << 64), "9" * 30])
def test_an_id_that_is_none(site: Site, text: str) -> None:
    (site.root / RUN / NODE_ID).write_text(text)
    with asked(site, OWN, OWN) as (_, executor, app), raises(FileUnreadable):
        executor.once()
    assert app.signed_as == []


def test_an_id_that_another_account_could_have_written(site: Site) -> None:
    (site.root / RUN / NODE_ID).chmod(0o666)
    with asked(site, OWN, OWN) as (_, executor, app), raises(FileUnreadable):
        executor.once()
    assert app.signed_as == []


def test_an_executor_ends_where_others_can_use_the_folder(site: Site) -> None:
    (site.root / RUN).chmod(0o777)
    with raises(LocalSocketRefused):
        Executor(site, App(), refuse).forever()


@pytest.mark.parametrize(
    "path", ["/docs", "/openapi.json", "/health", "/v1/runtime/responses", "/v1/runtime/get-nodes"]
)
def test_nothing_is_open_at_the_node_but_what_an_executor_asks_for(site: Site, path: str) -> None:
    with asked(site, OWN, OWN), local_client(site.root / RUN, SOCKET, LIMIT) as client:
        assert client.post(f"{URL}{path}", content=json.dumps({})).status_code == 404
        assert client.get(f"{URL}{path}").status_code == 404


def test_the_lifespan_reaches_the_application(folder: Path) -> None:
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        events.append(scope["type"])

    nothing: Any = None
    asyncio.run(RequestLimits(app, lambda _: None)({"type": "lifespan"}, nothing, nothing))
    assert events == ["lifespan"]
