"""What an app keeps between messages: its own, for as long as it lives, and no more than it may."""

from __future__ import annotations

import ast
import gc
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.client import app as client
from cloister_fl.client import app_state as module
from cloister_fl.client.app_state import Kept
from cloister_fl.client.data.cohort import Cohort, Patient
from cloister_fl.client.ledger.site_session import Admission, SiteSession
from cloister_fl.client.site.folder import init_site
from cloister_fl.study.schema import Study
from support import federations
from support.spending import admission


def study(name: str = "kept", fraction: float = 0.5) -> Study:
    return federations.study(
        study=f'name = "{name}"',
        privacy="enabled = false",
        evaluation=f"site_fraction = {fraction}",
    )


@pytest.fixture
def site(tmp_path: Path) -> SiteSession:
    return SiteSession(init_site(tmp_path / "anker", name="anker"))


def let_in(name: str = "kept", fraction: float = 0.5) -> Admission:
    return admission(study(name, fraction), "run")


class Disk:
    """A folder that is read; ``read`` counts how often."""

    def __init__(self) -> None:
        self.read = 0
        self.images = np.arange(16, dtype=np.uint16).reshape(4, 2, 2)
        self.targets = np.zeros((4, 2, 2), np.uint8)

    def __call__(self) -> Cohort:
        self.read += 1
        patients = tuple(Patient(f"{n:064x}", n % 2, (n,), f"{n:064x}") for n in range(4))
        return Cohort(self.images.copy(), patients, {}, {}, {}, self.targets.copy())


def test_a_cohort_is_read_once_and_anew_for_a_run(site: SiteSession) -> None:
    kept, disk = Kept(), Disk()
    first = kept.cohort(site, let_in(), disk)
    assert kept.cohort(site, let_in(), disk) is first
    assert disk.read == 1
    # Checked, and the same object, as features are kept with it.
    assert kept.cohort(site, let_in(), disk, anew=True) is first
    assert disk.read == 2
    disk.images[0] = 7
    changed = kept.cohort(site, let_in(), disk, anew=True)
    assert changed is not first
    assert changed.images[0].tolist() == [[7, 7], [7, 7]]
    # Features of single images outlast a change of others.
    assert changed.features.rows is first.features.rows


def test_a_cohort_whose_targets_changed_is_another_one(site: SiteSession) -> None:
    kept, disk = Kept(), Disk()
    first = kept.cohort(site, let_in(), disk)
    # Patients, labels and pixels are those of before: only a mask is drawn otherwise.
    disk.targets[3, 0, 0] = 1
    changed = kept.cohort(site, let_in(), disk, anew=True)
    assert changed is not first
    assert changed.targets[3].tolist() == [[1, 0], [0, 0]]


def test_parts_are_the_same_objects_until_the_cohort_changes(site: SiteSession) -> None:
    kept, disk = Kept(), Disk()
    trained, apart = kept.parts(site, let_in(), disk)
    assert (len(trained.patients), len(apart.patients)) == (2, 2)
    again = kept.parts(site, let_in(), disk)
    assert again[0] is trained
    assert again[1] is apart
    disk.images[0] = 7
    kept.cohort(site, let_in(), disk, anew=True)
    assert kept.parts(site, let_in(), disk)[0] is not trained


def test_nobody_is_kept_apart_where_the_study_says_so(site: SiteSession) -> None:
    kept, disk = Kept(), Disk()
    whole = let_in(fraction=0.0)
    cohort = kept.cohort(site, whole, disk)
    trained, apart = kept.parts(site, whole, disk)
    assert trained is cohort
    assert apart is cohort


def test_the_least_recently_used_goes(site: SiteSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COHORTS", 2)
    kept, disk = Kept(), Disk()
    for name in ("a", "b", "a", "c"):
        kept.cohort(site, let_in(name), disk)
    assert disk.read == 3
    kept.cohort(site, let_in("a"), disk)
    assert disk.read == 3
    kept.cohort(site, let_in("b"), disk)
    assert disk.read == 4


def test_all_goes_with_its_owner_and_no_other_sees_it(site: SiteSession) -> None:
    kept, other, disk = Kept(), Kept(), Disk()
    seen = weakref.ref(kept.cohort(site, let_in(), disk))
    other.cohort(site, let_in(), disk)
    assert disk.read == 2
    del kept
    gc.collect()
    assert seen() is None


def test_the_app_is_one_in_every_process_that_it_is_sent_to() -> None:
    assert pickle.loads(pickle.dumps(client.app)) is client.app
    assert client.SiteApp().kept is not client.app.kept
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(client.SiteApp())


def test_no_module_keeps_things_by_path_or_by_identity() -> None:
    """A dictionary of a module that begins empty is filled by its functions, and by nobody's."""
    found = set()
    for path in Path(client.__file__).parents[3].glob("*/cloister_fl/**/*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and (
                (isinstance(value, ast.Dict) and not value.keys)
                or (isinstance(value, ast.Call) and ast.unparse(value.func) in _EMPTY)
            ):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                found.add(f"{path.name} {ast.unparse(target)}")
    # By the shape of a network, which proves what it proved for as long as the process lives; and
    # the worker processes, which are the process's own.
    assert found == {
        "batch_independence.py _proved",
        "per_patient_gradients.py _tried",
        "pool.py _shared",
    }


_EMPTY = {"dict", "set", "OrderedDict", "defaultdict", "WeakKeyDictionary", "WeakValueDictionary"}
