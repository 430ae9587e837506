"""Simulation of a whole federation on one machine; the only module that starts both sides.

It runs the ServerApp and the ClientApp of a deployment on an engine of ``server.flower``. What it
adds stands outside both: it finds the sites' folders, evaluates on a hold-out that belongs to
no site, and shows the operator of the simulation, who is every site's operator too, why a site
said no.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from cloister_fl.errors import (
    CloisterError,
    DataError,
    FileUnreadable,
    OptionInvalid,
    RunError,
    SecureAggregationError,
    TooFewSitesGiven,
)
from cloister_fl.protocol.round_messages import ROSTER_KEY, SITE_KEY
from cloister_fl.secagg.parameters import Parameters
from cloister_fl.server.results.holdout_reader import read_holdout
from cloister_fl.server.rounds.events import Event, Hooks
from cloister_fl.simulation.holdout_overlap import refuse_overlap
from cloister_fl.simulation.run_folder import FEDERATION, claimed
from cloister_fl.study.gradient_engines import require_sound_engine
from cloister_fl.study.initial_model import bound
from cloister_fl.study.schema import Study
from cloister_fl.system.files import make_private_dir, write_atomic

if TYPE_CHECKING:
    from cloister_fl.client.site.folder import Site
    from cloister_fl.server.flower.engines import ClientCallable
    from cloister_fl.server.rounds.checkpoint import Checkpoints

Engine: TypeAlias = Literal["in-process", "ray"]

NOTICES = "site-notices.json"
"""What sites would tell their own people alone: beside the summary, which is handed on."""
_LIFETIME = 1000.0
"""Lifetime budget of a site that a simulation makes: its ledger lives as long as the run."""


@dataclass(frozen=True)
class Simulation:
    """What is simulated.

    Attributes:
        study: the study.
        sites: folder with a directory a site: ``dicom/`` and ``labels.csv``, or a site folder.
        out: folder of the run; new or empty, unless it is resumed.
        engine: ``in-process`` or ``ray``.
        resume: go on with the run in ``out``.
        holdout: folder with ``dicom/`` and ``labels.csv`` of patients of no site.
        signatures: who vouches for the study, see ``study.signatures``.
    """

    study: Study
    sites: Path
    out: Path
    engine: Engine = "in-process"
    resume: bool = False
    holdout: Path | None = None
    signatures: bytes = b""


def run_simulation(
    simulation: Simulation,
    *,
    notify: Callable[[Event], None] | None = None,
    check: Callable[[], None] | None = None,
    client_app: ClientCallable | None = None,
) -> dict[str, object]:
    """Run a simulation to its end and return the summary, as in ``summary.json``.

    Args:
        simulation: what to run.
        notify: is told of progress.
        check: is called before each round, when the last one is saved; may raise to end the run.
        client_app: in place of the product's ClientApp, for tests.

    Raises:
        StudyInvalid: the study's engine does not support its privacy claim.
        InitialModelUnfit: the study carries the hash of another initial model than is drawn here.
        OutputInTheWay: ``out`` holds something and ``resume`` is off, or another process works
            in it.
        NothingToResume, ResumeMismatch: ``resume`` is on, and ``out`` holds no run of the study.
        TooFewSitesGiven: there are fewer site folders than the study asks for.
        ParameterRefused: there are too few for secure aggregation.
        TooFewSites: too few sites take part; each site's own reason is told.
        DataError: the hold-out cannot be used.
    """
    from cloister_fl.server.rounds.checkpoint import CHECKPOINT_FOLDER, Checkpoints

    require_sound_engine(simulation.study)
    if simulation.engine == "ray":
        # Its processes start in another folder; see ``run_on_ray``.
        simulation = replace(
            simulation,
            sites=simulation.sites.absolute(),
            out=simulation.out.absolute(),
            holdout=simulation.holdout and simulation.holdout.absolute(),
        )
    folders = find_sites(simulation.sites, simulation.study)
    if simulation.holdout is not None and not (simulation.holdout / "dicom").is_dir():
        raise OptionInvalid(
            f"The hold-out {simulation.holdout} has no folder dicom/.",
            remedy="Name a folder with dicom/ and labels.csv of patients of no site.",
        )
    checkpoints = Checkpoints(simulation.out / CHECKPOINT_FOLDER)
    simulation = replace(simulation, study=_bound(simulation, checkpoints))
    if simulation.resume:
        # Looked at first: a folder without this study's run is left as it is.
        checkpoints.load(simulation.study)
    _distinct([site_name(folder) for folder in folders])
    with claimed(simulation.out, simulation.sites, simulation.holdout, resume=simulation.resume):
        return _run(simulation, folders, notify=notify, check=check, client_app=client_app)


def _bound(simulation: Simulation, checkpoints: Checkpoints) -> Study:
    """The study with the hash of its initial model; of a resumed run, of the one it began with."""
    study = simulation.study
    if simulation.resume:
        # The weights may have been drawn on another machine, or by another release of torch.
        stated = study.training.initial_model or checkpoints.initial_model()
        return study.bound_to(stated)
    return bound(study)


def _run(
    simulation: Simulation,
    folders: list[Path],
    *,
    notify: Callable[[Event], None] | None,
    check: Callable[[], None] | None,
    client_app: ClientCallable | None,
) -> dict[str, object]:
    """Run a simulation in the folder that is held for it."""
    from cloister_fl.client.app import app as product_client_app
    from cloister_fl.server.app import build
    from cloister_fl.server.flower.engines import run_in_process, run_on_ray
    from cloister_fl.server.results.artifacts import SUMMARY

    study = simulation.study
    sites = [_open(folder, simulation) for folder in folders]
    if simulation.holdout is not None:
        refuse_overlap(simulation.holdout / "dicom", {s.name: s.dicom for s in sites})
    holdout = (
        read_holdout(study, simulation.holdout, simulation.out) if simulation.holdout else None
    )
    hooks = Hooks(holdout=holdout)
    hooks = hooks if notify is None else replace(hooks, notify=notify)
    hooks = hooks if check is None else replace(hooks, check=check)
    server_app = build(hooks)
    config: dict[str, bool | float | int | str] = {
        "study": study.canonical(),
        "out": str(simulation.out),
        "federation": str(simulation.out / FEDERATION),
        "expected": len(sites),
        "resume": simulation.resume,
        "signatures": simulation.signatures.hex(),
    }
    nodes = _enrol(simulation, sites)
    run = run_on_ray if simulation.engine == "ray" else run_in_process
    try:
        run(server_app, client_app or product_client_app, nodes, config)
    except (RunError, SecureAggregationError) as error:
        raise _with_notices(error, sites, study) from None
    finally:
        for site in sites:
            product_client_app.kept.forget(site.root)
    told = _notices(sites, study)
    if told:
        write_atomic(simulation.out / NOTICES, json.dumps(told, indent=2).encode())
    else:
        (simulation.out / NOTICES).unlink(missing_ok=True)
    summary: dict[str, object] = json.loads((simulation.out / SUMMARY).read_text("utf-8"))
    return summary


def find_sites(folder: Path, study: Study) -> list[Path]:
    """Return the site folders below ``folder``, sorted by name.

    Raises:
        FileUnreadable: the folder cannot be read.
        OptionInvalid: a directory beside the sites is not a site folder.
        TooFewSitesGiven: there are fewer than the study's minimum.
        ParameterRefused: there are too few for secure aggregation.
    """
    try:
        children = sorted(
            child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")
        )
        found = [c for c in children if (c / "dicom").is_dir() or (c / "site.toml").is_file()]
    except OSError as error:
        raise FileUnreadable(
            f"The folder of sites, {folder}, cannot be read.",
            why=(error.strerror or "The system gave no reason") + ".",
            remedy="Name a folder with one directory a site, each with dicom/ and labels.csv.",
        ) from None
    left_out = [child.name for child in children if child not in found]
    if found and left_out:
        # Dropping a hospital without a word would be worse than stopping.
        one = len(left_out) == 1
        listed = _enumerated(left_out)
        raise OptionInvalid(
            f"{listed} in {folder} {'is not a site folder' if one else 'are not site folders'}.",
            why="A site is a directory with dicom/ and labels.csv, or with a site.toml.",
            remedy="Add what is missing, or move it to another folder."
            if one
            else "Add what is missing, or move them to another folder.",
        )
    needed = study.aggregation.min_sites
    if len(found) < needed:
        raise TooFewSitesGiven(
            f"The study asks for at least {needed} sites, and {folder} has {len(found)}.",
            why="A site is a directory with dicom/ and labels.csv, or with a site.toml.",
            remedy="Add sites, or lower aggregation.min_sites in the study.",
        )
    if study.aggregation.secure:
        Parameters.derive(len(found), study.aggregation.colluders)
    return found


def _enumerated(names: list[str], most: int = 5) -> str:
    """Return names as in a sentence: ``a``, ``a and b``, ``a, b and 3 more``."""
    shown = names[:most]
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)


def _open(folder: Path, simulation: Simulation) -> Site:
    """Open a site: in place where a person wrote a ``site.toml``, else below ``out``."""
    from cloister_fl.client.site.folder import init_site
    from cloister_fl.client.site.policy import Policy

    if (folder / "site.toml").is_file():
        return init_site(folder)
    study = simulation.study
    policy = Policy(
        max_epsilon_study=max(study.privacy.epsilon, Policy().max_epsilon_study),
        max_epsilon_lifetime=_LIFETIME,
        ledger_delta=max(study.privacy.delta, Policy().ledger_delta),
        # Whether a delta suits a hospital is for the hospital to say, in a site.toml of its own.
        patients_at_most=1,
        # What is missing at one site another has; who simulates sees all of them.
        min_patients_per_class_without_privacy=0,
        min_noise_multiplier=0.0,
        max_rounds=10_000,
        allow_without_privacy=True,
        metrics=("score-histograms",),
        require_secure_aggregation=False,
        colluders=min(study.aggregation.colluders, Policy().colluders),
        min_sites=min(study.aggregation.min_sites, Policy().min_sites),
        max_weight_ratio=study.aggregation.weight_ratio,
    )
    name = site_name(folder)
    make_private_dir(simulation.out / "sites")
    site = init_site(
        simulation.out / "sites" / name,
        name=name,
        dicom=(folder / "dicom").absolute(),
        labels=(folder / "labels.csv").absolute(),
        policy=policy,
        throwaway=True,
    )
    _approve(site, study)
    return site


def _approve(site: Site, study: Study) -> None:
    """Approve the study as its steward would: the researcher is that of a site made for this run.

    Data that cannot serve the study leave it unapproved, and are the site's notice. Without
    privacy, they are looked at in the run, which refuses them.
    """
    from cloister_fl.client.admission.approvals import Decision, judge, judgements
    from cloister_fl.client.data.loading import read_for_check
    from cloister_fl.client.site.data_notice import note_look
    from cloister_fl.client.steward.approval import approve

    why = "made for a simulation of it"
    if not study.privacy.enabled:
        judge(site, study, Decision.APPROVED, why=why)
        return
    held = judgements(site).get(study.digest)
    if held is not None and held.counts:
        return
    try:
        approve(site, study, read_for_check(site, study), why=why)
    except DataError as error:
        note_look(site.root, study.digest, [error])


def _enrol(simulation: Simulation, sites: list[Site]) -> list[dict[str, str]]:
    """Enrol the sites in a federation of this run, and accept its roster at each.

    The coordinator and every steward are one person here. The pins stand below ``out``, so that
    a hospital's own folder, where one is used, trusts no roster of a simulation.
    """
    from cloister_fl.client.site.trusted_roster import accept
    from cloister_fl.server.coordinator.federation import Federation

    if not simulation.study.aggregation.secure:
        return [{SITE_KEY: str(site.root)} for site in sites]
    federation = Federation(simulation.out / FEDERATION)
    roster = federation.enrol("simulation", {s.name: s.identity().public for s in sites})
    pins = simulation.out / FEDERATION / "pins"
    make_private_dir(pins)
    nodes = []
    for site in sites:
        pin = pins / f"{site.name}.pin"
        accept(pin, federation.signed(), federation.root, confirmed=roster.digest)
        nodes.append({SITE_KEY: str(site.root), ROSTER_KEY: str(pin)})
    return nodes


def site_name(folder: Path) -> str:
    """Make a site's name from its folder's: lower case, digits and hyphens."""
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")[:63]
    if not name:
        raise OptionInvalid(
            f"The site folder {folder.name!r} gives no usable name.",
            remedy="Rename it with letters and digits.",
        )
    return name


def _distinct(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise OptionInvalid(
                f"Two site folders give the same site name, {name!r}.", remedy="Rename one."
            )


def _notices(sites: list[Site], study: Study) -> dict[str, str]:
    """What each site's own people would read of this study: data that do not fit, a refusal."""
    from cloister_fl.client.site.data_notice import data_notices
    from cloister_fl.client.site.last_refusal import read_last_refusal

    found = {
        site.name: data_notices(site.root).get(study.digest) or read_last_refusal(site.root)
        for site in sites
    }
    return {name: notice.message for name, notice in found.items() if notice}


def notices_of(out: Path) -> dict[str, str]:
    """What the sites of a finished simulation told their own people, by site; see ``NOTICES``."""
    try:
        told = json.loads((out / NOTICES).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(text) for name, text in told.items()} if isinstance(told, dict) else {}


def _with_notices(error: CloisterError, sites: list[Site], study: Study) -> CloisterError:
    """Add what each site's operator would read; in a simulation that is the same person.

    What is wrong with the data says more than the refusal that came of it.
    """
    told = "\n".join(f"  {name}: {text}" for name, text in _notices(sites, study).items())
    if not told:
        return error
    return error.kind(error.what, why=error.why, remedy=f"{error.remedy}\n{told}")
