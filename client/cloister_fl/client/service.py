"""Service of a site: it keeps the node and the executor running, and reports their status.

::

    cloister client start        this module; holds no data, has no connection
      |- supernode.node          talks with the coordinator; sees no data
      `- supernode.executor      reads the data; talks with the node alone, over a UNIX socket

Until the coordinator has approved the site, it asks for the certificate and does nothing else.
What dies is started again. The executor is one warm process for as long as it lives, so a round
costs no start; what it keeps in memory alone is what a restart must lose (secure aggregation). The
site's certificate is renewed from 60 days before its end, see ``network.renewal``.

Files, below the site folder::

    service.lock          held while it runs; the process id
    run/service.json      where health is served, and how the site stands
    run/health            whether it serves, for a health check that costs next to nothing
    run/node.socket       where the node answers the executor
    run/node.id           as which node the site is online
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from cloister_fl.client.flower.names import RUN, SUPEREXEC_SECRET
from cloister_fl.client.network.join import MEMBERSHIP, look, membership
from cloister_fl.client.network.node_keys import CERTIFICATE, date_warnings, own_validity
from cloister_fl.client.network.renewal import is_unsettled, renew_certificate, settle
from cloister_fl.client.site.folder import Site
from cloister_fl.client.site.service_status import OFFLINE, ServiceStatus
from cloister_fl.errors import CloisterError, OutputInTheWay, ServiceState
from cloister_fl.membership.validity import RENEW_DAYS
from cloister_fl.system.child_process import Child, environment, failure_in_words
from cloister_fl.system.files import (
    create_secret,
    make_private_dir,
    mark_of,
    read_secret,
    write_atomic,
)
from cloister_fl.system.git_ignore import keep_out_of_git
from cloister_fl.system.health import FILE as HEALTH
from cloister_fl.system.health import Health, healthy
from cloister_fl.system.pid_lock import holder, only_one, terminate

LOCK = "service.lock"
STATE = "service.json"
TICK_S = 0.2
ASK_S = 10.0
"""Seconds between two questions whether the coordinator has approved this site."""
REMIND_S = 300.0
"""Seconds without a message after which it is told what a run may have left reserved."""

WARN_S = 86400.0
"""Seconds between two warnings of a certificate whose end is near."""

RENEW_S = 86400.0
"""Seconds between two looks whether the certificate is to be renewed."""
RETRY_S = 3600.0
"""Seconds until a renewal that failed, or that a message kept away, is tried again."""
QUIET_S = 600.0
"""Seconds without a message before a renewal, which restarts the node and so would cost a round."""
URGENT_DAYS = 7
"""Days before the end of the certificate from which a renewal waits for no quiet."""

Say = Callable[[str], None]


def serve(site: Site, say: Say) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        site: a site that has joined a federation.
        say: is given a line for the operator; none of them tells of a patient.

    Raises:
        ServiceState: the service of this site runs already.
        InviteInvalid: the site has joined no federation.
        FileUnreadable: a key is missing, or can be read by others.
        ListenRefused: the health port cannot be had.
        OutputInTheWay: the folder cannot be written.
    """
    os.umask(0o077)
    membership(site)

    def taken() -> Exception:
        return ServiceState(
            "The service of this site is already running.",
            remedy=f"See its status: {site.command('status')}",
        )

    with only_one(site.root / LOCK, taken):
        # A folder of an earlier version has none.
        keep_out_of_git(site.root)
        make_private_dir(site.root / RUN)
        create_secret(site.keys / SUPEREXEC_SECRET, secrets.token_hex(32).encode())
        read_secret(site.keys / SUPEREXEC_SECRET)
        _Service(site, say).run()


def running(site: Site) -> int | None:
    """The service's process id, or ``None`` where it does not run."""
    return holder(site.root / LOCK)


def stop(site: Site, seconds: float) -> None:
    """End the service.

    Raises:
        ServiceState: it does not run, or has not ended in time.
    """
    ended = terminate(site.root / LOCK, seconds)
    if ended is None:
        raise ServiceState(
            "The service of this site is not running.", remedy=f"Start it: {site.command('start')}"
        )
    if not ended:
        raise ServiceState(
            f"The service has not ended within {seconds:g} s.",
            remedy=f"Wait longer: {site.command('stop --wait 120')}",
        )


def status(site: Site) -> ServiceStatus | None:
    """Return the status of the service, or ``None`` where it does not run."""
    if running(site) is None:
        return None
    try:
        return ServiceStatus(**json.loads((site.root / RUN / STATE).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_serving(now: ServiceStatus) -> bool:
    """Ask the health service itself."""
    return healthy(now.health)


class _Service:
    def __init__(self, site: Site, say: Say) -> None:
        self._site = site
        self._say = say
        self._stop = False
        self._reminded = False
        self._is_kept = True
        self._warned = -math.inf
        self._renews = -math.inf
        self._renewal: threading.Thread | None = None
        self._shown = mark_of(site.keys / CERTIFICATE)
        self._dialled = mark_of(site.root / MEMBERSHIP)
        self._events: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self._children: dict[str, Child] = {}
        setting = "health below [service] in site.toml"
        self._health = Health(site.health, site.root / RUN / HEALTH, setting)
        host = site.health.rpartition(":")[0]
        self._now = ServiceStatus(health=f"{host}:{self._health.port}")

    def run(self) -> None:
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._asked_to_stop) for number in numbers}
        try:
            self._serve()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _serve(self) -> None:
        self._keep()
        try:
            self._await_approval()
            self._shown = mark_of(self._site.keys / CERTIFICATE)
            self._children = self._parts()
            while not self._stop:
                for child in self._children.values():
                    child.tend()
                self._hear()
                self._health.serving(self._now.serving)
                self._remind()
                self._renew()
                self._show_renewed()
                self._go_to_new_address()
                self._warn()
                time.sleep(TICK_S)
        finally:
            self._health.serving(False)
            # The executor first: what it answers now must not be taken for a dropout's.
            for name in ("executor", "node"):
                if name in self._children:
                    self._children[name].stop()
            self._health.close()
            with contextlib.suppress(OSError):
                (self._site.root / RUN / STATE).unlink()

    def _parts(self) -> dict[str, Child]:
        env = environment({"FLWR_HOME": str(self._site.root / RUN / "flower")})
        package = "cloister_fl.client.flower"
        return {
            name: Child(name, ("-m", f"{package}.{name}", str(self._site.root)), env, self._events)
            for name in ("node", "executor")
        }

    def _await_approval(self) -> None:
        """Until this site has its certificate: ask for it, now and then."""
        asked = -math.inf
        while not self._stop and not (self._site.keys / CERTIFICATE).exists():
            if time.monotonic() - asked >= ASK_S:
                asked = time.monotonic()
                self._ask_for_approval()
            else:
                time.sleep(TICK_S)
        self._now.approved = True

    def _ask_for_approval(self) -> None:
        try:
            if look(self._site).state == "approved":
                self._say("The coordinator has approved this site.")
                return
            why = "the coordinator has not approved this site yet"
        except CloisterError as error:
            # A network that is down now may be up later; what was refused needs a person.
            why = " ".join(part for part in (error.what, error.why) if part).rstrip(".")
        if why != self._now.why:
            self._now.why = why
            self._say(f"Waiting: {why}.")
            self._keep()

    def _asked_to_stop(self, *_: object) -> None:
        self._stop = True

    def _hear(self) -> None:
        changed = False
        while True:
            try:
                name, event = self._events.get_nowait()
            except queue.Empty:
                break
            self._take(name, event)
            changed = True
        if changed:
            self._health.serving(self._now.serving)
            self._keep()

    def _remind(self) -> None:
        """Say once, when messages have ceased, what a run that has ended leaves reserved."""
        now = self._now
        if self._reminded or not now.last_asked or time.time() - now.last_asked < REMIND_S:
            return
        self._reminded = True
        # Here: most services need no accountant.
        from cloister_fl.client.steward.budget import left_reserved

        # What is wrong with the ledger is told where something is asked of it.
        with contextlib.suppress(CloisterError):
            for line in left_reserved(self._site):
                self._say(f"{line[0].upper()}{line[1:]}.")

    def _renew(self) -> None:
        """At the start, and once a day: renew the certificate where its end is near.

        In a thread, for the network may take minutes. What fails is tried again and said nowhere:
        the daily warning says that the end is near, and ``renew`` why it is not renewed.
        """
        if time.monotonic() < self._renews or self._is_renewing():
            return
        wanted: Callable[[Site], object] | None = settle if is_unsettled(self._site) else None
        with contextlib.suppress(CloisterError):
            own = own_validity(self._site)
            days = own.days_left() if own is not None else 0.0
            if wanted is None and 0 < days < RENEW_DAYS:
                wanted = renew_certificate
            if wanted is not None and days > URGENT_DAYS and self._is_busy():
                self._renews = time.monotonic() + QUIET_S
                return
        self._renews = time.monotonic() + (RENEW_S if wanted is None else RETRY_S)
        if wanted is not None:
            self._renewal = threading.Thread(target=self._try, args=(wanted,), daemon=True)
            self._renewal.start()

    def _try(self, renewal: Callable[[Site], object]) -> None:
        try:
            renewal(self._site)
        except CloisterError:
            return
        except Exception as error:
            self._events.put(("renewal", {"event": "crashed", "type": type(error).__name__}))

    def _is_renewing(self) -> bool:
        return self._renewal is not None and self._renewal.is_alive()

    def _is_busy(self) -> bool:
        return time.time() - self._now.last_asked < QUIET_S

    def _show_renewed(self) -> None:
        """Restart the node where the certificate was renewed, by this service or a command."""
        mark = mark_of(self._site.keys / CERTIFICATE)
        if mark is None or mark == self._shown:
            return
        self._shown = mark
        with contextlib.suppress(CloisterError):
            if (own := own_validity(self._site)) is not None:
                self._say(f"Restarting the node: its certificate is new, until {own.until}.")
        self._restart_node("the node restarts with the renewed certificate")

    def _go_to_new_address(self) -> None:
        """Restart the node where ``cloister client address`` named another one."""
        mark = mark_of(self._site.root / MEMBERSHIP)
        if mark is None or mark == self._dialled:
            return
        self._dialled = mark
        with contextlib.suppress(CloisterError):
            self._say(f"Restarting the node: the coordinator is at {membership(self._site).fleet}.")
        self._restart_node("the node restarts with the coordinator's new address")

    def _restart_node(self, why: str) -> None:
        self._now.node, self._now.online, self._now.why = False, False, why
        self._health.serving(False)
        self._keep()
        self._children["node"].stop()

    def _warn(self) -> None:
        """Say at the start, and once a day, which certificate ends soon."""
        if self._is_renewing():
            return
        if time.monotonic() - self._warned >= WARN_S:
            self._warned = time.monotonic()
            for line in date_warnings(self._site):
                self._say(line)

    def _take(self, name: str, event: dict[str, Any]) -> None:
        now = self._now
        match event.get("event"):
            case "ready":
                setattr(now, name, True)
                if name == "executor":
                    self._say("Ready: waiting for studies that you approved.")
            case "ended":
                setattr(now, name, False)
                if name == "node":
                    now.online, now.why = False, "the node is restarting"
                self._say(f"The {name} ended; restarting it.")
            case "online":
                now.online, now.why = True, ""
                self._say("The coordinator answers.")
            case "offline":
                why = str(event.get("why"))
                now.online, now.why = False, OFFLINE.get(why, f"the connection failed ({why})")
                self._say(f"Offline: {now.why}.")
            case "asked":
                kind = str(event.get("message")) or "unknown"
                now.asked[kind] = now.asked.get(kind, 0) + 1
                now.last_asked = time.time()
                self._reminded = False
            case "foreign-bundle":
                self._say("Refused: the coordinator sent another application bundle (CLO-505).")
            case "data":
                study = str(event.get("study"))[:16]
                self._say(
                    f"Data of the study {study}: {event.get('code')}. Rounds are answered with "
                    f"what is left of them. See: {self._site.command('status')}"
                )
            case "task-refused":
                self._say(f"Refused: {event.get('code')} {event.get('what')}")
            case "failed":
                self._say(f"The {name} cannot start: {failure_in_words(event)}")
            case "crashed" | "task-lost":
                self._say(f"Internal error of the {name} ({event.get('type')}); it continues.")

    def _keep(self) -> None:
        text = json.dumps(asdict(self._now))
        try:
            write_atomic(self._site.root / RUN / STATE, text.encode(), durable=False)
        except OutputInTheWay as error:
            # Only `status` reads it: a service that ended would cost the round under way.
            if self._is_kept:
                self._say(f"{error.code} {error.what} {error.why} The service goes on.")
            self._is_kept = False
        else:
            self._is_kept = True
