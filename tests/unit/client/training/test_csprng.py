"""The source of noise: known answers, distributions, and that no one can repeat it."""

from __future__ import annotations

import copy
import inspect
import math
import os
import pickle
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import cloister_fl
import cloister_fl.client
from cloister_fl.client.training import csprng
from cloister_fl.client.training.csprng import SecureRandom, bernoulli_from
from cloister_fl.errors import InternalError

pytestmark = pytest.mark.process


@pytest.fixture
def fixed_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csprng, "_fresh_key", lambda: bytes(range(32)))


def test_keystream_known_answer() -> None:
    # NIST SP 800-38A, F.5.5 CTR-AES256.Encrypt: key, first counter block, output blocks.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    output = bytes.fromhex(
        "0bdf7df1591716335e9a8b15c860c5025a6e699d536119065433863c8f657b94"
        "1bc12c9c01610d5d0d8bd6a3378eca622956e1c8693536b1bee99c73a31576b6"
    )
    assert csprng._keystream(key, counter).update(bytes(64)) == output


@pytest.mark.usefixtures("fixed_key")
def test_words_are_the_encrypted_counter() -> None:
    block = Cipher(algorithms.AES(bytes(range(32))), modes.ECB()).encryptor()
    counters = b"".join(number.to_bytes(16, "big") for number in range(5))
    assert SecureRandom().words(10).astype("<u8").tobytes() == block.update(counters)


@pytest.mark.usefixtures("fixed_key")
def test_counter_starts_at_zero_and_pieces_join() -> None:
    whole = SecureRandom().words(1000)
    source = SecureRandom()
    assert np.array_equal(np.concatenate([source.words(n) for n in (1, 2, 0, 997)]), whole)


@pytest.mark.usefixtures("fixed_key")
@pytest.mark.parametrize("std", [1.0, 37.5])
def test_normals_are_normal(std: float) -> None:
    n = 1_000_001
    drawn = SecureRandom().normal(n, std).numpy() / std
    ordered = np.sort(drawn)
    exact = 0.5 * (1 + torch.erf(torch.from_numpy(ordered) / math.sqrt(2)).numpy())
    gap = np.abs(exact - (np.arange(n) + 0.5) / n).max()
    assert gap * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov at 0.1 %
    assert abs(drawn.mean()) < 3.3 / math.sqrt(n)
    assert abs(drawn.var() - 1) < 3.3 * math.sqrt(2 / n)
    assert abs((drawn**4).mean() - 3) < 3.3 * math.sqrt(96 / n)
    # Cosine and sine of one pair must not go together, nor neighbours.
    for shift in (1, n // 2, csprng._CHUNK // 2):
        assert abs((drawn[shift:] * drawn[:-shift]).mean()) < 4 / math.sqrt(n - shift)


def test_normals_take_any_count_and_type() -> None:
    source = SecureRandom()
    for n in (0, 1, 2, 7, csprng._CHUNK, csprng._CHUNK + 1):
        assert source.normal(n).shape == (n,)
    assert source.normal(5, dtype=torch.float32).dtype == torch.float32
    assert not source.normal(5, 0.0).any()
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError):
            source.normal(1, std)


@pytest.mark.usefixtures("fixed_key")
def test_tails_are_there() -> None:
    drawn = SecureRandom().normal(4_000_000).abs()
    assert abs(float((drawn**2).mean()) - 1) < 3.3 * math.sqrt(2 / 4_000_000)
    beyond = int((drawn > 4).sum())
    expected = 4_000_000 * math.erfc(4 / math.sqrt(2))
    assert abs(beyond - expected) < 4 * math.sqrt(expected)
    assert drawn.max() < math.sqrt(106 * math.log(2))


@pytest.mark.usefixtures("fixed_key")
@pytest.mark.parametrize("q", [0.001, 0.02, 0.5, 0.97])
def test_inclusion_frequency_and_independence(q: float) -> None:
    source = SecureRandom()
    draws = np.stack([source.bernoulli(q, 50) for _ in range(20_000)])
    spread = math.sqrt(q * (1 - q))
    assert abs(draws.mean() - q) < 4 * spread / 1000
    assert np.abs(draws.mean(axis=0) - q).max() < 5 * spread / math.sqrt(20_000)
    # Sizes of the sample are binomial: pairs of patients are drawn independently.
    sizes = draws.sum(axis=1)
    assert abs(sizes.var() / (50 * spread**2) - 1) < 0.06


@pytest.mark.parametrize("q", [5e-324, 1e-20, 0.3 * 2.0**-53, 0.1, 0.3, 1 - 2.0**-53, 1.0])
def test_a_rate_below_the_grid_of_the_coins_samples_nobody_more_often(q: float) -> None:
    """A study of 10^9 steps at a rate of 1e-20 drew a patient with a chance of 1e-7, not 1e-11.

    Its accountant said epsilon 0 at a delta of 1e-10, whatever the noise.
    """
    most = math.floor(Fraction(q) * 2**53)
    words = np.array([0, max(0, most - 1)], np.uint64) << np.uint64(11)
    assert list(bernoulli_from(words, q)) == [most > 0] * 2
    if most < 2**53:
        assert not bernoulli_from(np.array([most], np.uint64) << np.uint64(11), q)[0]


def test_certain_and_impossible_coins() -> None:
    source = SecureRandom()
    assert source.bernoulli(1.0, 10_000).all()
    assert not source.bernoulli(0.0, 10_000).any()
    assert source.bernoulli(0.5, 0).shape == (0,)
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError):
            source.bernoulli(q, 1)


@pytest.mark.usefixtures("fixed_key")
def test_integers_and_shuffles_are_uniform() -> None:
    source = SecureRandom()
    for high in (1, 2, 7, 3 * 2**61):
        drawn = source.integers(high, 60_000)
        assert drawn.min() >= 0
        assert drawn.max() < high
        assert abs(drawn.astype(float).mean() / high - (1 - 1 / high) / 2) < 0.006
    counts = np.bincount(source.integers(7, 70_000), minlength=7)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22.5  # chi-square, 6 degrees, 0.1 %
    orders = [tuple(source.shuffle("abc")) for _ in range(6_000)]
    assert ((np.unique(orders, axis=0, return_counts=True)[1] - 1_000) ** 2 / 1_000).sum() < 20.5
    assert sorted(source.shuffle(range(100))) == list(range(100))
    for high in (0, -1, 2**63):
        with pytest.raises(ValueError):
            source.integers(high, 1)


def test_no_two_objects_repeat_whatever_the_seeds() -> None:
    seen = set()
    for _ in range(50):
        torch.manual_seed(0)
        np.random.seed(0)
        seen.add(SecureRandom().words(2).tobytes())
    assert len(seen) == 50


def test_two_processes_that_start_alike_draw_differently() -> None:
    body = """
import random, numpy, torch
random.seed(0); numpy.random.seed(0); torch.manual_seed(0)
from cloister_fl.client.training.csprng import SecureRandom
print(torch.rand(1).item(), SecureRandom().words(8).tobytes().hex())
"""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-W", "ignore", "-c", body]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    one, other = (process.communicate(timeout=120)[0].split() for process in started)
    assert one[0] == other[0]
    assert len(one[1]) == len(other[1]) == 128
    # Not one word of 64 bits is the same, at any place.
    words = [
        {text[place : place + 16] for place in range(0, 128, 16)} for text in (one[1], other[1])
    ]
    assert not words[0] & words[1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_refused_and_a_fresh_object_differs() -> None:
    source = SecureRandom()
    source.words(1)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            source.words(1)
            os.write(write, b"repeated" * 2)
        except InternalError:
            os.write(write, SecureRandom().words(2).tobytes())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    child = os.read(read, 16)
    os.close(read)
    os.close(write)
    assert child != b"repeated" * 2
    assert len(child) == 16
    assert child != source.words(2).tobytes()


def test_another_process_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # A fork by a library in C runs no Python hook.
    source = SecureRandom()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(InternalError, match="fork"):
        source.normal(3)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(duplicate: object) -> None:
    with pytest.raises(TypeError, match="copied or pickled"):
        duplicate(SecureRandom())  # type: ignore[operator]


def test_there_is_no_switch() -> None:
    assert list(inspect.signature(SecureRandom).parameters) == []
    assert list(inspect.signature(csprng._fresh_key).parameters) == []
    source = inspect.getsource(csprng)
    assert inspect.getsource(csprng._fresh_key).count("os.urandom(32)") == 1
    assert not re.search(r"os\.environ|getenv|argv|manual_seed\(|default_rng", source)
    # Nothing else in the wheel touches the key.
    roots = [Path(each) for each in cloister_fl.__path__]
    for path in [path for root in roots for path in root.rglob("*.py")]:
        if path.name != "csprng.py":
            assert "_fresh_key" not in path.read_text(encoding="utf-8"), path
