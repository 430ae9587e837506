"""Sums of a run that are kept, so that anybody computes them and the server's steps again.

``sums`` in the checkpoint's folder, mode 0700, has files of mode 0600: ``initial``, the model
before round 1; a file for each roster; and one for each round that has a sum, also where the sum
was discarded. Each is written whole, before the state that counts its round.

**Only with privacy on, and where all of it fits ``MOST_BYTES``.** With privacy on, a site's vector
under its masks is an update to which the site itself added all the noise that its ledger is charged
for. Should the masks ever fall, years from now, what the files tell of a patient stays within that
epsilon. Without privacy nothing but the masks protects, and nothing is kept.

**Only of an attempt that has its sum.** An attempt that failed is never on disk. So there is one
record a round, of one set of survivors: two sets, whose sums differ by single hospitals, are not in
the files. A round that a crash cut off counts as lost and is not trained again; a record that it
left is removed before the run goes on.
"""

from __future__ import annotations

import stat
from collections.abc import Collection
from pathlib import Path

import numpy as np

from cloister_fl.errors import FileUnreadable, RosterInvalid
from cloister_fl.membership.roster import MAX_SITES, Roster
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.secagg import SumRecord
from cloister_fl.study.schema import Study
from cloister_fl.system.files import sweep, write_atomic

SUMS_FOLDER = "sums"
"""Its name inside the checkpoint's folder."""

KEPT = "kept"
"""What a run says where its sums are kept."""
MOST_BYTES = 10**9
MOST_A_ROUND = 250 * 10**6
"""Most bytes of a round: they are in memory until it has its sum."""
_EACH_PAIR, _EACH_SITE = 512, 2048
"""Most bytes of a round's signatures, boxes and shares: for two sites, and for one."""
_ROSTER_BYTES = 256 * MAX_SITES
_INITIAL = "initial"


def round_bytes(sites: int, dimension: int) -> int:
    """Most bytes of the record of one round."""
    return sites * (4 * dimension + _EACH_SITE + _EACH_PAIR * sites)


def why_not(study: Study, sites: int, dimension: int) -> str:
    """Return why the sums of a run are not kept, in words; empty where they are.

    Args:
        study: what is trained.
        sites: how many are invited.
        dimension: parameters of its network.
    """
    if not study.aggregation.secure:
        return "secure aggregation is off"
    if not study.privacy.enabled:
        return "privacy is off"
    each = round_bytes(sites, dimension)
    total = study.training.rounds * each + 4 * dimension
    if total > MOST_BYTES:
        return f"{total / 1e9:.1f} GB are more than {MOST_BYTES / 1e9:.0f} GB"
    if each > MOST_A_ROUND:
        return f"{each / 1e6:.0f} MB a round are more than {MOST_A_ROUND / 1e6:.0f} MB"
    return ""


class KeptSums:
    """The folder of the sums of one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def exists(self) -> bool:
        """Whether the run keeps its sums."""
        return self._folder.is_dir()

    def begin(self, model: Vector) -> None:
        """Make the folder, with the model before round 1."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Whatever the umask was, and whoever made the folder.
        self._folder.chmod(0o700)
        write_atomic(self._folder / _INITIAL, _bytes(model))

    def go_on(self, roster: Roster, rounds: Collection[int]) -> None:
        """Go on with a roster; records of other rounds than these are removed.

        Args:
            roster: of the rounds to come.
            rounds: those that gave a sum, as the state on disk says.
        """
        sweep(self._folder)
        counted = {self._round(number) for number in rounds}
        for path in self._folder.glob("round-*"):
            if path not in counted:
                path.unlink()
        write_atomic(self._roster(roster.digest), roster.encode())

    def keep(self, number: int, record: SumRecord) -> None:
        """Write the record of a round's sum, durably."""
        write_atomic(self._round(number), record.encode())

    def has(self, number: int) -> bool:
        """Whether there is a record of a round."""
        return self._round(number).exists()

    def record(self, number: int, *, sites: int, dimension: int) -> SumRecord:
        """Read the record of a round.

        Raises:
            FileUnreadable: there is none, or it is larger than a record of the run.
            SecureAggregationError: it is malformed.
        """
        return SumRecord.decode(read_bounded(self._round(number), round_bytes(sites, dimension)))

    def roster(self, digest: bytes) -> Roster:
        """Read a roster by its digest.

        Raises:
            FileUnreadable, RosterInvalid: it is not there, or another one.
        """
        roster = Roster.decode(read_bounded(self._roster(digest), _ROSTER_BYTES))
        if roster.digest != digest:
            raise RosterInvalid("A kept roster has another hash than its name says.")
        return roster

    def initial(self, dimension: int) -> Vector:
        """Read the model before round 1.

        Raises:
            FileUnreadable: it is not there, or of another length.
        """
        path = self._folder / _INITIAL
        data = read_bounded(path, 4 * dimension)
        if len(data) != 4 * dimension:
            raise FileUnreadable(f"{path.name} has another length than the model.")
        return np.frombuffer(data, "<f4").astype(np.float32)

    def _round(self, number: int) -> Path:
        return self._folder / f"round-{number:06d}"

    def _roster(self, digest: bytes) -> Path:
        return self._folder / f"roster-{digest.hex()}"


def read_bounded(path: Path, most: int) -> bytes:
    """Return the bytes of a regular file of at most ``most`` bytes.

    Raises:
        FileUnreadable: it is none, cannot be read, or is larger.
    """
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode):
            raise FileUnreadable(f"{path.name} is not a regular file.")
        if about.st_size > most:
            raise FileUnreadable(f"{path.name} is larger than it can be.")
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        why = (error.strerror or "The system gave no reason") + "."
        raise FileUnreadable(f"{path.name} cannot be read.", why=why) from None


def _bytes(model: Vector) -> bytes:
    return np.ascontiguousarray(model, "<f4").tobytes()
