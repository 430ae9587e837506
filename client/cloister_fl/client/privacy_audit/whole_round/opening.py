"""Opening of an audit: the same requests to the same made-up sites, here and in other processes.

It is the first thing that a process does, so that whatever is keyed by a count, a name, a seed or
a round repeats where it is repeated. Run as a module it is another process, which hands what it was
answered to its parent on standard output.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.privacy_audit.whole_round.audited_studies import small_study
from cloister_fl.client.privacy_audit.whole_round.evidence import Vector
from cloister_fl.client.privacy_audit.whole_round.made_up_patients import (
    Kind,
    cohort_of,
    kinds_of,
)
from cloister_fl.client.privacy_audit.whole_round.release_claims import (
    Released,
    release,
    released_of,
)
from cloister_fl.client.privacy_audit.whole_round.round_reference import Reference
from cloister_fl.client.privacy_audit.whole_round.throwaway_site import ThrowawaySite
from cloister_fl.errors import InternalError
from cloister_fl.study.schema import Study
from cloister_fl.system.child_process import die_with_parent, environment

NAMES = ("anker", "birke")
_MODULE = "cloister_fl.client.privacy_audit.whole_round.opening"

Answers = Mapping[str, NDArray[np.float64]]
"""What the sites answered: for ``noise/NAME`` and ``sampling/NAME`` (rounds, D), for
``release/NAME`` (counts,)."""


@dataclass(frozen=True, eq=False)
class Opening:
    """What is asked for.

    Attributes:
        noisy: a study whose rounds have no patients.
        sampled: a study of the same network whose rounds have one patient of each kind.
        kinds: of those patients.
        model: the model that is sent in both.
        released: a release.
    """

    noisy: Study
    sampled: Study
    kinds: Sequence[Kind]
    model: NDArray[np.float32]
    released: Released


@cache
def opening() -> Opening:
    """What every process asks for, the same in each."""
    noisy = small_study("opening-noise", rounds=3, steps=3)
    sampled = small_study("opening-sampling", rounds=5, steps=2, sampling_rate=0.5, clip=1.0)
    released = small_study("opening-release", classes=64, rounds=1, release=100.0)
    return Opening(
        noisy,
        sampled,
        kinds_of(sampled, 24, images=(1,)),
        Reference(noisy).first * np.float32(0.75),
        released_of(released),
    )


def open_audit(folder: Path) -> Answers:
    """Ask two made-up sites in ``folder``, which is private, for rounds and a release each."""
    asked, answers = opening(), dict[str, Vector]()
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in NAMES:
        for what, study, kinds in (
            ("noise", asked.noisy, ()), ("sampling", asked.sampled, asked.kinds)
        ):  # fmt: skip
            site = ThrowawaySite(folder / f"{name}-{what}", study, asked.model, name=name)
            site.place(cohort_of(study, kinds, [1] * len(kinds)))
            numbers = range(1, study.training.rounds + 1)
            answers[f"{what}/{name}"] = np.stack(
                [site.train(number, asked.model) for number in numbers]
            )
        counts = release(asked.released, folder / f"{name}-release", name)
        answers[f"release/{name}"] = counts.astype(np.float64)
    return answers


def open_elsewhere() -> Answers:
    """Do the same in another process.

    Raises:
        InternalError: it failed.
    """
    done = subprocess.run(  # noqa: S603 - our own module
        [sys.executable, "-P", "-m", _MODULE],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment({"OMP_NUM_THREADS": "1"}),
        check=False,
    )
    try:
        with np.load(io.BytesIO(done.stdout), allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError):
        raise InternalError(
            "The audit's second process failed.",
            why="It asks the same of other made-up sites, to see whether noise repeats.",
        ) from None


def main() -> None:
    """Answer the parent."""
    import torch

    die_with_parent()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cloister-audit-") as folder:
        answers = open_audit(Path(folder))
    held = io.BytesIO()
    np.savez(held, **answers)  # type: ignore[arg-type]
    sys.stdout.buffer.write(held.getvalue())


if __name__ == "__main__":
    main()
