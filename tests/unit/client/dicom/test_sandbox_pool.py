"""Workers that crash, hang or lie cost one file; none outlives its parent or holds its secrets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from cloister_fl.client.dicom import acceptance
from cloister_fl.client.dicom.folder_reader import Accepted, Refused, read_folder
from cloister_fl.client.dicom.image import read_image
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.sandbox import pool as pools
from cloister_fl.client.dicom.sandbox import worker_process
from cloister_fl.client.dicom.sandbox.pool import (
    Pool,
    Reading,
    close_shared_pool,
    default_workers,
    shared_pool,
)
from cloister_fl.client.dicom.sandbox.worker_process import NotStarted, Worker
from cloister_fl.errors import DecoderUnfit, Reject
from cloister_fl.study.schema import Input
from support.dicom import make_dicom, radiograph, write_dicom

pytestmark = pytest.mark.process


SPEC = Input(size=16)
MISBEHAVING = "support.misbehaving_worker"
SLOW = JPEG2000Lossless
SOUND = make_dicom(radiograph(1), bits_stored=12)
EXHAUSTED, FAILED = Reject.EXHAUSTED, Reject.DECODE_FAILED


def _made() -> Iterator[Pool]:
    made = Pool(1, module=MISBEHAVING)
    yield made
    made.close()


pool = pytest.fixture(_made, scope="module", name="pool")
fresh = pytest.fixture(_made, name="fresh")


def _outcome(pool: Pool, data: bytes) -> Reject | None:
    try:
        facts, image = pool.submit(data, SPEC).result(60)
    except RejectedFile as rejected:
        return rejected.reason
    assert facts.patient_id
    assert (image.shape, image.dtype) == ((16, 16), np.uint16)
    return None


def _pids(pool: Pool) -> list[int]:
    return [worker._process.pid for worker in pool._running]


def _names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def _running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def _gone(pids: list[int]) -> bool:
    end = time.monotonic() + 10
    while any(_running(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(_running(pid) for pid in pids)


def test_what_a_worker_reads_is_what_is_read_here(pool: Pool) -> None:
    checked = acceptance.precheck(SOUND, SPEC.modalities)
    known, expected = read_image(checked, SPEC)
    facts, image = pool.submit(SOUND, SPEC).result(60)
    assert facts == known
    assert np.array_equal(image, expected)
    assert "P1" not in repr(facts)


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("segfault", FAILED),
        ("abort", FAILED),
        ("exit", FAILED),
        ("kill", EXHAUSTED),
        ("memory", EXHAUSTED),
        ("map", FAILED),
        ("compute", EXHAUSTED),
        ("close", FAILED),
        ("resize", FAILED),
        ("empty", FAILED),
        ("garbage", FAILED),
        ("oversized", FAILED),
        ("wrong-serial", FAILED),
        ("unknown-code", FAILED),
        ("not-a-reject", FAILED),
        ("not-its-code", FAILED),
        ("unfit", FAILED),
        ("other-modality", FAILED),
        ("no-patient", FAILED),
        ("no-uid", FAILED),
        ("no-rows", FAILED),
        ("too-many-pixels", FAILED),
        ("no-text", FAILED),
        ("cut", FAILED),
        ("longer", FAILED),
    ],
)
def test_a_deed_costs_one_file(pool: Pool, deed: str, reason: Reject) -> None:
    assert _outcome(pool, b"do:" + deed.encode()) is reason
    assert _outcome(pool, SOUND) is None
    assert len(pool._running) == 1


@pytest.mark.parametrize("deed", ["sys-exit", "recursion", "panic"])
def test_what_is_raised_costs_no_worker(pool: Pool, deed: str) -> None:
    assert _outcome(pool, SOUND) is None
    before = _pids(pool)
    assert _outcome(pool, b"do:" + deed.encode()) is FAILED
    assert _outcome(pool, SOUND) is None
    assert _pids(pool) == before


@pytest.mark.parametrize("deed", ["spin", "sleep"])
def test_a_worker_that_dawdles_is_replaced(
    pool: Pool, deed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _outcome(pool, SOUND) is None
    before = _pids(pool)
    monkeypatch.setattr(worker_process, "WALL_SECONDS", 0.5)
    start = time.monotonic()
    assert _outcome(pool, b"do:" + deed.encode()) is EXHAUSTED
    assert time.monotonic() - start < 5
    assert _gone(before)
    monkeypatch.setattr(worker_process, "WALL_SECONDS", 30)
    assert _outcome(pool, SOUND) is None


def test_a_second_answer_does_not_stand_for_the_next_file(pool: Pool) -> None:
    # The first is believed, for nobody can tell; the second must not be.
    assert _outcome(pool, b"do:twice") is None
    other = make_dicom(radiograph(2), bits_stored=12, patient_id="P2")
    assert _outcome(pool, other) is FAILED
    facts, _ = pool.submit(other, SPEC).result(60)
    assert facts.patient_id == "P2"


def test_a_worker_that_died_in_its_sleep_costs_nothing(pool: Pool) -> None:
    assert _outcome(pool, SOUND) is None
    (worker,) = pool._running
    os.kill(worker._process.pid, signal.SIGKILL)
    assert _gone([worker._process.pid])
    assert _outcome(pool, SOUND) is None


def test_what_a_worker_can_do(fresh: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", "secret")
    with Path("/etc/passwd").open() as inherited:
        os.set_inheritable(inherited.fileno(), True)
        facts, _ = fresh.submit(b"do:tell", SPEC).result(60)
    told = json.loads(facts.accession)
    for what in ("open", "write", "socket", "fork", "raise", "grow"):
        assert told[what] in ("OSError", "PermissionError", "BlockingIOError", "ValueError"), what
    assert told["import"] == "ModuleNotFoundError"
    assert told["modules"] == []
    assert told["capabilities"] == 0
    assert not any("CANARY" in name or "PYTHON" in name for name in told["environment"])
    assert told["limits"] == [2 << 30, 0, 0]
    assert 0 < told["cpu"] <= 21
    assert told["session"]


def test_there_are_as_many_workers_as_cores_and_memory_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    gigabytes = {"SC_PHYS_PAGES": 1 << 24, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", gigabytes.__getitem__)
    for pages, workers in ((1 << 24, 8), (5 << 18, 2), (1 << 18, 1)):
        gigabytes["SC_PHYS_PAGES"] = pages
        assert default_workers() == workers


@pytest.mark.parametrize("segmentations", [False, True])
def test_a_worker_loads_what_decodes_and_nothing_of_the_site_or_of_training(
    segmentations: bool,
) -> None:
    # What it loads is what it costs to start, and what a hostile file could turn to use.
    code = f"""if True:
        import os, sys
        from cloister_fl.client.dicom.sandbox import worker
        from cloister_fl.client.dicom.size_limits import MAX_OUT_BYTES

        def seal():
            loaded = {{name.split(".")[0] for name, module in sys.modules.items() if module}}
            print(*sorted(loaded), flush=True)
            print(*(name for name in sys.modules if name.startswith("cloister_")), flush=True)
            os._exit(0)

        worker.seal = seal
        memory = os.memfd_create("image")
        os.ftruncate(memory, MAX_OUT_BYTES)
        worker.serve(None, 0, memory, segmentations={segmentations})
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages, ours = (set(line.split()) for line in done.stdout.splitlines())
    assert {"numpy", "pydicom"} <= packages
    assert not packages & {
        *("torch", "flwr", "opacus", "grpc", "scipy", "pandas", "sklearn", "matplotlib"),
        *("cryptography", "requests", "httpx", "pynetdicom", "rich", "typer"),
    }
    # highdicom keeps the frames of a file in a database in memory.
    assert (("highdicom" in packages), ("sqlite3" in packages)) == (segmentations, segmentations)
    # No key, no site, no study: of ours, it knows how DICOM is read, and next to nothing else.
    assert {name for name in ours if not name.startswith("cloister_fl.client.dicom")} == {
        *("cloister_fl", "cloister_fl.client", "cloister_fl.errors"),
        *(
            f"cloister_fl.errors.{name}"
            for name in ("families", "faulty_file", "numbered", "reject_codes")
        ),
        *(
            "cloister_fl.system",
            "cloister_fl.system.libraries",
            "cloister_fl.system.libraries.logs",
            "cloister_fl.system.text",
        ),
    }


def test_an_unfit_decoder_is_told_only_of_its_own_syntax() -> None:
    pool = Pool(1, module="support.unfit_worker")
    try:
        assert _outcome(pool, SOUND) is None
        with pytest.raises(DecoderUnfit, match=r"1\.2\.840\.10008\.1\.2\.4\.80"):
            _outcome(pool, make_dicom(transfer_syntax=JPEGLSLossless))
        assert _outcome(pool, make_dicom(transfer_syntax=JPEG2000Lossless)) is None
    finally:
        pool.close()


def test_workers_that_cannot_start_are_an_error() -> None:
    pool = Pool(1, module="no_such_module")
    try:
        for _ in range(2):
            with pytest.raises(DecoderUnfit, match="cannot be started"):
                _outcome(pool, SOUND)
    finally:
        pool.close()
    with pytest.raises(NotStarted):
        Worker("no_such_module")


@pytest.mark.slow
def test_a_worn_or_idle_worker_is_replaced(fresh: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "MAX_FILES", 2)
    seen = set()
    for _ in range(4):
        assert _outcome(fresh, SOUND) is None
        seen.update(_pids(fresh))
    assert len(seen) == 2
    monkeypatch.setattr(pools, "IDLE_SECONDS", 0.1)
    assert _outcome(fresh, SOUND) is None
    before = _pids(fresh)
    assert _gone(before)
    assert _outcome(fresh, SOUND) is None


def test_closing_ends_the_busy_and_leaves_nothing() -> None:
    handles, shared = _names("/proc/self/fd"), _names("/dev/shm")
    pool = Pool(2, module=MISBEHAVING)
    for _ in range(2):
        assert _outcome(pool, SOUND) is None
    futures = [pool.submit(b"do:sleep", SPEC) for _ in range(2)]
    waiting = pool.submit(SOUND, SPEC)
    end = time.monotonic() + 20
    while len(pool._running) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    pids = _pids(pool)
    pool.close()
    assert len(pids) == 2
    assert not any(_running(pid) for pid in pids)
    assert all(future.done() for future in (*futures, waiting))
    assert waiting.cancelled()
    assert _names("/proc/self/fd") == handles
    assert _names("/dev/shm") == shared
    with pytest.raises(RuntimeError):
        pool.submit(SOUND, SPEC)


@pytest.mark.slow
def test_crashes_leak_no_descriptor(pool: Pool) -> None:
    assert _outcome(pool, SOUND) is None
    before = len(_names("/proc/self/fd"))
    for deed in (b"segfault", b"garbage", b"memory", b"exit"):
        assert _outcome(pool, b"do:" + deed) is not None
    assert _outcome(pool, SOUND) is None
    assert len(_names("/proc/self/fd")) == before


def test_a_fork_has_a_pool_of_its_own() -> None:
    mine = shared_pool()
    assert _outcome(mine, SOUND) is None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = _outcome(shared_pool(), SOUND) is None and shared_pool() is not mine
            os.write(write, b"y" if answer else b"n")
            close_shared_pool()
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"y"
    os.close(read)
    os.waitpid(child, 0)
    assert _outcome(mine, SOUND) is None


SCRIPT = """
    import sys, time
    from cloister_fl.client.dicom.sandbox.pool import Pool
    from cloister_fl.study.schema import Input
    pool = Pool(2, module="support.misbehaving_worker")
    futures = [pool.submit(b"do:" + deed, Input(size=16)) for deed in (b"spin", b"sleep")]
    while len(pool._running) < 2:
        time.sleep(0.02)
    print(*(worker._process.pid for worker in pool._running), flush=True)
    time.sleep(1)
    futures[0].result()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_its_parent(how: signal.Signals) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(_running(pid) for pid in pids)
        parent.send_signal(how)
        parent.wait(20)
    assert _gone(pids)


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    expected: list[str | Reject] = []
    for number in range(30):
        path = tmp_path / f"{number:02d}"
        if number % 5 == 3:
            path.write_bytes(b"no image")
            expected.append(Reject.NOT_DICOM)
        else:
            # Sizes differ, so that workers overtake each other.
            image = radiograph(number, 32 + 700 * (number % 2), 40)
            write_dicom(path, image, bits_stored=12, patient_id=f"P{number}")
            expected.append(f"P{number}")
    progress: list[tuple[int, int]] = []
    outcomes = list(
        read_folder(tmp_path, SPEC, key=b"k", progress=lambda *told: progress.append(told))
    )
    assert progress == [(number, 30) for number in range(1, 31)]
    found = [one.keys.patient_id if isinstance(one, Accepted) else one.reason for one in outcomes]
    assert found == expected


@pytest.mark.slow
def test_a_reader_that_stops_early_leaves_the_pool_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        image = radiograph(number, 1000, 1000)
        write_dicom(tmp_path / f"{number:02d}", image, bits_stored=12, transfer_syntax=SLOW)
    futures: list[Future[Reading]] = []
    submit = Pool.submit

    def noted(self: Pool, data: bytes, spec: Input, **rest: Any) -> Future[Reading]:
        futures.append(submit(self, data, spec, **rest))
        return futures[-1]

    monkeypatch.setattr(Pool, "submit", noted)
    outcomes = read_folder(tmp_path, SPEC, key=b"k")
    assert isinstance(next(outcomes), Accepted)
    outcomes.close()  # type: ignore[attr-defined]
    assert len(futures) < 12
    assert any(future.cancelled() for future in futures)
    assert sum(isinstance(one, Accepted) for one in read_folder(tmp_path, SPEC, key=b"k")) == 12


def test_a_twin_read_ahead_is_still_a_duplicate(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(SOUND)
    outcomes = list(read_folder(tmp_path, SPEC, key=b"k"))
    assert [isinstance(one, Refused) for one in outcomes] == [False, True, True]


@pytest.mark.parametrize(
    "charset",
    ["", "ISO_IR 100", "ISO_IR 144", "ISO_IR 192", "GB18030", "ISO 2022 IR 87", "windows-1251"],
)
def test_character_sets_are_read_as_without_a_worker(pool: Pool, charset: str) -> None:
    raw = {"ISO_IR 192": "Ж-é-山".encode(), "GB18030": "Ж-山".encode("gb18030")}
    raw["ISO 2022 IR 87"] = "山".encode("iso2022_jp")
    data = make_dicom(
        patient_id="P" * 24,
        elements={"SpecificCharacterSet": charset, "AccessionNumber": "A" * 14},
    )
    data = data.replace(b"P" * 24, raw.get(charset, b"\xc6\xe9\xd0").ljust(24))
    known, _ = read_image(acceptance.precheck(data, SPEC.modalities), SPEC)
    facts, _ = pool.submit(data, SPEC).result(60)
    assert facts.patient_id == known.patient_id


def test_a_character_set_that_is_none_does_not_hurt(pool: Pool) -> None:
    data = make_dicom(elements={"SpecificCharacterSet": "CANARY"})
    assert _outcome(pool, data) is None
    assert _outcome(pool, SOUND) is None
