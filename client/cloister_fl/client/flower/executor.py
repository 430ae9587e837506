"""Run executor of a site: its part of a study, in one warm process, and nothing else.

Run as ``python -m cloister_fl.client.flower.executor DIR`` by ``service``. It asks the node for
tasks over a UNIX socket in the site's folder, which no other account can take or reach, with a
secret that only this site's user can read. As which node it answers, the site's own file says, and
a message for another node is not answered. A task names a bundle; every bundle but the installed
wheel's own is refused before anything else. Then the message goes to the one ClientApp that is
installed here, whose gate stands before all data. Nothing of the bundle is installed, imported or
run, and Flower is never handed an exception: it would send its text to the coordinator.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.common.serde import context_to_proto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp as flower

from cloister_fl.client.flower.names import FOREIGN, LARGEST, RUN, SOCKET, SUPEREXEC_SECRET
from cloister_fl.client.flower.own_node import own_node
from cloister_fl.client.site.data_notice import DataNotice, data_notices
from cloister_fl.client.site.folder import Site, open_site
from cloister_fl.errors import (
    BundleRefused,
    CloisterError,
    LocalSocketRefused,
    MessageInvalid,
)
from cloister_fl.protocol.app_bundle import bundle_hash
from cloister_fl.protocol.round_messages import SITE_KEY, kind_of
from cloister_fl.system.child_process import child, tell, tell_failed
from cloister_fl.system.files import read_secret
from cloister_fl.system.local_socket.socket_client import URL, local_client

_METHODS = frozenset({"/flwr.proto.Runtime/AcquireTask"})
_BUSY_S = 0.2
_IDLE_S = 1.0
_STAYS_BUSY_S = 60.0

App = Callable[[Message, Context], Message]


class Executor:
    """Takes tasks from the node, one at a time.

    Args:
        site: the hospital's site.
        app: the ClientApp.
        refuse: makes the answer to a message that asked for another bundle.
    """

    def __init__(
        self,
        site: Site,
        app: App,
        refuse: Callable[[Message, Context, CloisterError], Message],
    ) -> None:
        self._site = site
        self._app = app
        self._refuse = refuse
        self._notices: dict[str, DataNotice] = {}
        self._asks = self._client(
            SuperExecAuthHttpInterceptor(
                master_secret=read_secret(site.keys / SUPEREXEC_SECRET), protected_methods=_METHODS
            )
        )

    def forever(self) -> None:
        """Ask for tasks and do them, until the process ends.

        Raises:
            LocalSocketRefused: the node's socket is not this user's alone.
        """
        stirred = time.monotonic() - _STAYS_BUSY_S
        reached = False
        while True:
            try:
                took = self.once()
                if not reached:
                    reached = True
                    tell("ready")
                    self._tell_of_data()
            except httpx.HTTPError:
                # The node is not there, or was restarted while a task was under way.
                took, reached = False, False
            except LocalSocketRefused:
                raise
            except CloisterError as error:
                tell("task-refused", code=error.code, what=error.what)
                took = False
            except Exception as error:
                # One task is lost, and what this process remembers of the round is not.
                tell("task-lost", type=type(error).__name__)
                took = False
            if took:
                stirred = time.monotonic()
            else:
                busy = time.monotonic() - stirred < _STAYS_BUSY_S
                time.sleep(_BUSY_S if busy else _IDLE_S)

    def once(self) -> bool:
        """Do one task, if there is one."""
        found = self._asks.AcquireTask(
            AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        )
        if not found.HasField("task") or not found.token:
            return False
        client = self._client(RuntimeTokenHttpInterceptor(found.token))
        beats = HeartbeatSender(functools.partial(_beat, client))
        beats.start()
        try:
            self._do(client)
        finally:
            beats.stop()
            client.close()
        return True

    def _do(self, client: RuntimeHttpClient) -> None:
        message, context, run, _ = flower.pull_task_input(client)
        context.node_id = TaskIdentity.node_id = own_node(self._site)
        if message.metadata.dst_node_id != context.node_id:
            raise MessageInvalid(
                "A message for another node came, and was not answered.",
                why="It names another node than this site's own.",
                remedy=f"Start the service again: {self._site.command('stop')}, "
                f"then {self._site.command('start')}",
            )
        # What a hospital's node is told about itself comes from the hospital alone.
        context.run_config = {}
        context.node_config = {SITE_KEY: str(self._site.root)}
        tell("asked", message=kind_of(message.content) if message.has_content() else "")
        if run.fab_id != FOREIGN and hmac.compare_digest(run.fab_hash, bundle_hash()):
            reply = self._app(message, context)
        else:
            reply = self._refuse(
                message,
                context,
                BundleRefused(
                    "The coordinator sent another application bundle than this version's own.",
                    why="It contains code, or the coordinator runs another version of Cloister.",
                    remedy="Install the same version on both sides; compare: cloister --version",
                ),
            )
        self._tell_of_data()
        flower.push_message(client, reply, context)
        client.PushTaskOutput(
            PushTaskOutputRequest(
                context=context_to_proto(context), sub_status=SubStatus.COMPLETED, details=""
            )
        )

    def _tell_of_data(self) -> None:
        """Tell the service of notices on the data that are new, by code and study."""
        known = data_notices(self._site.root)
        for digest, notice in known.items():
            if self._notices.get(digest) != notice:
                tell("data", study=digest, code=notice.code)
        self._notices = known

    def _client(self, last: Any) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        made = RuntimeHttpClient(URL, interceptors=[version, last], verify=False)
        made._client.close()
        made._client = local_client(self._site.root / RUN, SOCKET, LARGEST)
        return made


def _beat(client: RuntimeHttpClient) -> bool:
    """Tell the node that the task goes on. A node that is gone is met when the answer is given."""
    with contextlib.suppress(httpx.HTTPError):
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    return True


def main(folder: Path) -> None:
    """Run until SIGTERM."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    site = open_site(folder)
    from cloister_fl.client.app import app

    app.verify(site.root)
    Executor(site, app, app.refuse).forever()


if __name__ == "__main__":
    with child():
        try:
            main(Path(sys.argv[1]))
        except CloisterError as error:
            tell_failed(error)
            sys.exit(error.exit_status)
