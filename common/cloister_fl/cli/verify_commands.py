"""`cloister verify`: offline checks of an audit log, a privacy certificate or a run's folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from cloister_fl.audit_log import MAX_LINE, Verdict, examine, holds_entries
from cloister_fl.cli.verify_certificate import is_certificate, verify_certificate
from cloister_fl.cli.verify_run import verify_run
from cloister_fl.errors import AuditLogDamaged, FileUnreadable, OptionInvalid
from cloister_fl.membership.identity import KEY_BYTES, fingerprint

_SHOWN = 40


def verify(
    file: Annotated[
        Path,
        typer.Argument(
            help="An audit log (JSON Lines), a site's certificate, or the folder of a run."
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            help="For a log: the other side's, to find what was cut off or replaced. For a "
            "certificate: the site's own log."
        ),
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="For a certificate: the ledger's export of that site.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Public key that must have signed, 64 hexadecimal digits.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check an audit log, a privacy certificate or a run, offline.

    A log: every line that was edited, deleted, inserted or moved. A certificate: signature, form,
    and epsilon by another accountant. A run: every sum from what the sites signed, and every step
    from the sums. The exit status is 0 where nothing was found.
    """
    if file.is_dir():
        if ledger is not None or against is not None or key is not None:
            raise OptionInvalid(
                f"{file} is a folder, and --against, --ledger and --key apply to files only.",
                remedy=f"Run: {shlex.join(['cloister', 'verify', str(file)])}",
            )
        verify_run(file, as_json=as_json)
        return
    if is_certificate(file):
        verify_certificate(file, key=_key(key), ledger=ledger, log=against, as_json=as_json)
        return
    if ledger is not None:
        raise OptionInvalid(
            f"{file} is an audit log, and --ledger applies to certificates only.",
            remedy="Leave --ledger out, or name a certificate.",
        )
    for each in (file, against):
        if each is not None:
            _require_log(each)
    verdict = examine(file, key=_key(key), peer=against)
    if as_json:
        typer.echo(json.dumps(_as_dict(verdict)))
    else:
        typer.echo(_in_words(verdict, compared=against is not None))
    if verdict.findings:
        raise typer.Exit(AuditLogDamaged.exit_status)


def _require_log(path: Path) -> None:
    """Refuse a file that is no audit log at all, so that it is not reported as a changed log."""
    name = path.name or str(path)
    try:
        with path.open("rb") as file:
            start = file.read(2 * MAX_LINE)
        # A ledger's export is chained, too; its entries are one level down.
        sound = b'"previous":' in start and not start.startswith(b'{"body":')
        sound = sound or not start or holds_entries(path)
    except OSError as error:
        raise FileUnreadable(
            f"{name} cannot be read.",
            why=(error.strerror or "The system gave no reason") + ".",
            remedy="Name an audit log or a certificate.",
        ) from None
    if not sound:
        raise FileUnreadable(
            f"{name} is neither an audit log nor a certificate.",
            why="It has no entry of an audit log.",
            remedy="Name an audit log (audit.jsonl) or a site's certificate. A ledger's export "
            "goes with its certificate: --ledger.",
        )


def _key(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise OptionInvalid(
            "The public key is not 64 hexadecimal digits.", remedy="Give it as --key HEX."
        )
    return key


def _as_dict(verdict: Verdict) -> dict[str, object]:
    return {
        "sound": not verdict.findings,
        "entries": verdict.entries,
        "head": str(verdict.head),
        "signed_up_to": verdict.signed,
        "keys": list(verdict.keys),
        "findings": [
            {"line": one.line, "what": one.what} | ({"file": one.file} if one.file else {})
            for one in verdict.findings
        ],
    }


def _in_words(verdict: Verdict, *, compared: bool) -> str:
    lines = [f"{verdict.entries} entries, signed up to entry {verdict.signed}"]
    lines += [f"  signed by  {fingerprint(bytes.fromhex(key))}" for key in verdict.keys]
    for found in verdict.findings[:_SHOWN]:
        lines.append(f"  {found.where}{found.what}")
    if len(verdict.findings) > _SHOWN:
        lines.append(f"  and {len(verdict.findings) - _SHOWN} more")
    if verdict.findings:
        lines.append("The log was changed.")
    elif compared:
        lines.append("The log was not changed, and all that the other side recorded is there.")
    else:
        lines.append(
            "The log was not changed. Only the other side's log shows whether its end was cut off: "
            "--against."
        )
    return "\n".join(lines)
