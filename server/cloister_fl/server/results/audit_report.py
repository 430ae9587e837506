"""Report of the coordinator's logs: messages to and from each site, and rejected requests.

Two logs: the signed one, of decisions, runs and messages (``Federation.log``), and the listener's
own, of connections that never got as far (``rejection_log``). The second is not signed: the process
that writes it faces the network, and holds no key of the federation.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloister_fl.audit_log import Entry, Finding, examine, is_begun, read
from cloister_fl.errors import AuditLogDamaged
from cloister_fl.server.coordinator.rejection_log import KEPT_FILES
from cloister_fl.server.rounds.collector import REASONS
from cloister_fl.server.rounds.messenger import SILENT, UNREADABLE
from cloister_fl.server.rounds.site_log_heads import followed, seats_in

DECISIONS = (
    *("invited", "approved", "revoked", "roster", "ledger-accepted"),
    *("server-renewed", "site-renewed"),
)
"""Kinds of entries that a command of the coordinator's people writes."""


@dataclass
class Run:
    """One run, over all its resumptions.

    Attributes:
        run: its id.
        study: the study's hash; empty where it never began.
        began: when, as often as it was begun or resumed.
        sites: who takes part.
        refused: reason by site, as last told.
        summed: numbers of the rounds that have a sum.
        lost: numbers of the rounds that have none.
        discarded: numbers of the rounds whose sum no honest sites can give.
        ended: ``done``, the code of the error that ended it, or empty.
    """

    run: str
    study: str = ""
    began: list[str] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    summed: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    discarded: list[int] = field(default_factory=list)
    ended: str = ""


@dataclass
class Came:
    """What came from one site, or from a node that no run seated.

    Attributes:
        site: its name; ``node N`` where no run began with it.
        asked: messages that were sent to it, by kind.
        came: messages that it sent, by kind.
        bytes: their payload.
        refused: how often it refused, by reason.
        unanswered: how often its node failed.
        rollbacks: how often its audit log went on from an older entry than before.
    """

    site: str
    asked: dict[str, int] = field(default_factory=dict)
    came: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    unanswered: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class TurnedAway:
    """Connections and requests that a port refused for one reason.

    Attributes:
        listener: ``fleet`` or ``enrolment``.
        code: the reason, see ``rejection_log.Refused``.
        count: how many, those that a flood kept out of the log among them.
        peers: from how many addresses.
        sites: sites whose certificate was shown.
        last: when last.
    """

    listener: str
    code: str
    count: int
    peers: int
    sites: tuple[str, ...]
    last: str


@dataclass(frozen=True)
class Account:
    """Both logs, summed up.

    Attributes:
        entries: how many the signed log has.
        signed: number of the last that a signature covers.
        first, last: times of its first and last entry; empty where there is none.
        decisions: what the coordinator's people decided, in order.
        runs: the runs, in order.
        sites: what was asked of each site, and what came.
        turned_away: by port and reason.
    """

    entries: int
    signed: int
    first: str
    last: str
    decisions: tuple[dict[str, str | int | bool | None], ...]
    runs: tuple[Run, ...]
    sites: tuple[Came, ...]
    turned_away: tuple[TurnedAway, ...]


def account(log: Path, *, key: bytes | None = None, refused: Path | None = None) -> Account:
    """Read the coordinator's logs; one that is missing says nothing.

    Args:
        log: the signed log.
        key: the root's public key, 32 bytes; else whoever signed is taken.
        refused: the listener's log; its older parts are looked for beside it.

    Raises:
        AuditLogDamaged: the signed log is not sound.
    """
    entries = tuple(read(log)) if is_begun(log) else ()
    verdict = examine(log, key=key) if entries else None
    if verdict is not None and verdict.findings:
        raise AuditLogDamaged(
            "The audit log cannot be trusted.",
            why=_first(verdict.findings[0]),
            remedy=f"Keep the file, and list all errors: cloister verify {shlex.quote(str(log))}",
        )
    return Account(
        entries=len(entries),
        signed=verdict.signed if verdict is not None else 0,
        first=entries[0].time if entries else "",
        last=entries[-1].time if entries else "",
        decisions=tuple(
            {"time": entry.time, "kind": entry.kind, **entry.body}
            for entry in entries
            if entry.kind in DECISIONS
        ),
        runs=_runs(entries),
        sites=_sites(entries),
        turned_away=_turned_away(refused) if refused is not None else (),
    )


def _first(found: Finding) -> str:
    where = f"{found.file}, line {found.line}" if found.file else f"Line {found.line}"
    return f"{where}: {found.what}."


def render(told: Account) -> str:
    """Return the account as text for a terminal."""
    if not told.entries:
        lines = ["The audit log has no entries yet."]
    else:
        lines = [
            f"{told.entries} entries from {told.first} to {told.last}, "
            f"signed up to entry {told.signed}"
        ]
    lines += [line for one in told.decisions for line in _decision(one)]
    for run in told.runs:
        lines += _in_words(run)
    if told.sites:
        lines.append("Messages to and from each site:")
    for came in told.sites:
        lines.append(
            f"  {came.site:<24} asked {_counts(came.asked) or 'nothing'}; "
            f"sent {_counts(came.came) or 'nothing'}, {came.bytes:,} bytes"
        )
        if came.refused:
            reasons = (
                f"{count} x {REASONS.get(reason, reason)}"
                for reason, count in sorted(came.refused.items())
            )
            lines.append(f"  {'':<24} refused: {'; '.join(reasons)}")
        if came.unanswered:
            lines.append(f"  {'':<24} its node failed: {came.unanswered} x")
        if came.rollbacks:
            lines.append(
                f"  {'':<24} its audit log was rolled back or replaced: {came.rollbacks} x; its "
                "steward finds the place: cloister verify SITE_LOG --against LOG"
            )
    if told.turned_away:
        lines.append("Rejected at the ports:")
    for one in told.turned_away:
        shown = f", with the certificate of {', '.join(one.sites)}" if one.sites else ""
        lines.append(
            f"  {one.count:>6} x {one.code:<22} {one.listener:<10} "
            f"from {one.peers} address{'es' if one.peers != 1 else ''}{shown}, last {one.last}"
        )
    if told.entries:
        lines.append(
            "The log is consistent. Only the log of a site shows whether its end was cut off: "
            "cloister verify LOG --against SITE_LOG"
        )
    return "\n".join(lines)


def _runs(entries: Sequence[Entry]) -> tuple[Run, ...]:
    runs: dict[str, Run] = {}
    for entry in entries:
        if entry.kind not in {"began", "summed", "lost", "discarded", "ended"}:
            continue
        body = entry.body
        name = str(body.get("run"))
        run = runs.setdefault(name, Run(name))
        if entry.kind == "began":
            run.began.append(entry.time)
            run.study, run.ended = str(body.get("study")), ""
            run.sites = [site for _, site in seats_in(entry)]
            run.refused = _reasons(entry)
        elif entry.kind == "ended":
            run.ended, run.refused = str(body.get("how")), _reasons(entry)
        else:
            of_kind = {"summed": run.summed, "lost": run.lost, "discarded": run.discarded}
            of_kind[entry.kind].append(_number(body.get("round")))
    return tuple(runs.values())


def _sites(entries: Sequence[Entry]) -> tuple[Came, ...]:
    names: dict[str, str] = {}
    for entry in entries:
        if entry.kind in {"began", "seated"}:
            names.update(seats_in(entry))
    found: dict[str, Came] = {}

    def of(node: str) -> Came:
        name = names.get(node, f"node {node}")
        return found.setdefault(name, Came(name))

    for entry in entries:
        body = entry.body
        kind = str(body.get("message") or "something else")
        if entry.kind == "sent":
            for node in str(body.get("nodes")).split():
                _add(of(node).asked, kind)
        elif entry.kind == "received":
            came = of(str(body.get("node")))
            _add(came.came, kind)
            came.bytes += _number(body.get("bytes"))
            if body.get("reason"):
                _add(came.refused, str(body["reason"]))
        elif entry.kind == "unanswered" and body.get("reason") in {SILENT, UNREADABLE}:
            _add(of(str(body.get("node"))).refused, str(body["reason"]))
        elif entry.kind == "unanswered":
            of(str(body.get("node"))).unanswered += 1
    for (site, _), log in followed(entries, names).items():
        found[site].rollbacks += log.rollbacks
    return tuple(found[name] for name in sorted(found))


def _turned_away(path: Path) -> tuple[TurnedAway, ...]:
    counts: Counter[tuple[str, str]] = Counter()
    peers: dict[tuple[str, str], set[str]] = {}
    sites: dict[tuple[str, str], set[str]] = {}
    last: dict[tuple[str, str], str] = {}
    for line in _lines(path):
        key = (str(line.get("listener")), str(line.get("code")))
        counts[key] += 1 + _number(line.get("not_shown"))
        peers.setdefault(key, set()).add(str(line.get("peer")))
        if line.get("site"):
            sites.setdefault(key, set()).add(str(line["site"]))
        last[key] = max(last.get(key, ""), str(line.get("time")))
    return tuple(
        TurnedAway(*key, counts[key], len(peers[key]), tuple(sorted(sites.get(key, ()))), last[key])
        for key in sorted(counts)
    )


def _lines(path: Path) -> Iterator[Mapping[str, object]]:
    """The listener's lines, oldest file first; one that a kill cut short is passed over."""
    older = [path.with_name(f"{path.name}.{number}") for number in range(KEPT_FILES, 0, -1)]
    for part in (*older, path):
        if not part.exists():
            continue
        for text in part.read_text("utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def _reasons(entry: Entry) -> dict[str, str]:
    told = str(entry.body.get("refused") or "")
    return dict(part.rsplit("=", 1) for part in told.split("; ") if "=" in part)


def _number(value: object) -> int:
    return value if type(value) is int else 0


def _add(counts: dict[str, int], kind: str) -> None:
    counts[kind] = counts.get(kind, 0) + 1


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))


def _decision(one: Mapping[str, str | int | bool | None]) -> Iterator[str]:
    if one["kind"] == "roster":
        what = f"number {one.get('serial')} of {one.get('sites')} sites, digest {one.get('digest')}"
    else:
        what = str(one.get("site") or "")
        if one.get("key_fingerprint"):
            what += f", key {one['key_fingerprint']}"
    yield f"  {one['time']}  {one['kind']:<8}  {what}".rstrip()


def _in_words(run: Run) -> Iterator[str]:
    how = {"done": "done", "": "running or interrupted"}.get(run.ended, f"ended with {run.ended}")
    yield f"Run {run.run[:16]} of study {run.study[:16] or 'unknown: it did not start'}: {how}"
    if run.began:
        often = f", {len(run.began)} times" if len(run.began) > 1 else ""
        yield f"  started    {run.began[0]}{often}, with {', '.join(run.sites)}"
    if run.summed or run.lost or run.discarded:
        told = f"{len(run.summed)} aggregated"
        for what, numbers in (("lost", run.lost), ("discarded", run.discarded)):
            told += f", {what} {', '.join(map(str, numbers))}" if numbers else ""
        yield f"  rounds     {told}"
    for site, reason in sorted(run.refused.items()):
        yield f"  refused    {site}: {REASONS.get(reason, reason)}"
