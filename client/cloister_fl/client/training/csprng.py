"""Cryptographic random numbers for noise and sampling: AES-256-CTR, keyed by the operating system.

Noise and sampling that someone can repeat protect nobody, and torch's generator can be repeated by
anyone who calls ``manual_seed``. So there is no seed here: no argument, no environment variable, no
attribute. A test can only replace the module's private ``_fresh_key``, and another test makes sure
that this is the only way.

The generator is a deterministic random bit generator in the sense of NIST SP 800-90A only in
spirit: one fresh 256-bit key per object, a 128-bit counter from zero, no reseeding. Counter mode
repeats nothing before 2^128 blocks; it differs from uniform by birthday effects that show after
about 2^64 blocks (2^68 bytes), more than any study draws.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NoReturn, Protocol, TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from cloister_fl.errors import InternalError

_CHUNK = 1 << 19
"""Words drawn at a time: 4 MiB, which stays in the processor's cache."""

_UNIT = 2.0**-53
_MASK = (1 << 53) - 1

T = TypeVar("T")

_forks = 0


def _count_fork() -> None:
    global _forks  # noqa: PLW0603 - one count a process, bumped in the child of each fork
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


def _fresh_key() -> bytes:
    """256 bits from the operating system. Tests may replace this function; nothing else may."""
    return os.urandom(32)


def _keystream(key: bytes, counter: bytes) -> CipherContext:
    """AES in counter mode (NIST SP 800-38A, 6.5), from a 16-byte first counter block."""
    return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()


class Source(Protocol):
    """What sampling needs of a source of randomness."""

    def words(self, n: int) -> NDArray[np.uint64]: ...

    def bernoulli(self, q: float, n: int) -> NDArray[np.bool_]: ...

    def integers(self, high: int, n: int) -> NDArray[np.int64]: ...


def bernoulli_from(words: NDArray[np.uint64], q: float) -> NDArray[np.bool_]:
    """Turn uniform words into coins that fall True with chance ``q``, or up to 2^-53 below it.

    Never above: a rate may be smaller than 2^-53 itself, and many steps may follow. A patient who
    joins more seldom than was accounted for costs less.
    """
    if not 0 <= q <= 1:
        raise ValueError("a chance lies between 0 and 1")
    mask: NDArray[np.bool_] = (words >> np.uint64(11)) < np.uint64(math.floor(q * 2.0**53))
    return mask


class SecureRandom:
    """A stream of random numbers that no one can repeat.

    One object belongs to one process: after a fork, parent and child would draw the same noise, so
    the child's copy refuses. It can be neither copied nor pickled, for the same reason.
    """

    def __init__(self) -> None:
        self._owner = (os.getpid(), _forks)
        self._encryptor = _keystream(_fresh_key(), bytes(16))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("SecureRandom cannot be copied or pickled: the copy would repeat the noise")

    def _fill(self, count: int) -> bytearray:
        """Return the next ``8 * count`` bytes of the keystream."""
        if self._owner != (os.getpid(), _forks):
            raise InternalError(
                "A source of randomness was used after a fork.",
                why="Parent and child would draw the same noise.",
                remedy="Make a SecureRandom in the process that uses it.",
            )
        # The cipher asks for a block of room beyond what it writes.
        out = bytearray(8 * count + 15)
        self._encryptor.update_into(bytes(8 * count), out)
        return out

    def words(self, n: int) -> NDArray[np.uint64]:
        """Return ``n`` uniform 64-bit words."""
        if n == 0:
            return np.empty(0, np.uint64)
        return np.frombuffer(self._fill(n), dtype="<u8", count=n).astype(np.uint64, copy=False)

    def bernoulli(self, q: float, n: int) -> NDArray[np.bool_]:
        """Return ``n`` independent coins, each True with chance ``q``.

        Raises:
            ValueError: ``q`` is not between 0 and 1.
        """
        return bernoulli_from(self.words(n), q)

    def integers(self, high: int, n: int) -> NDArray[np.int64]:
        """Return ``n`` uniform whole numbers from 0 to ``high`` - 1, without bias.

        Raises:
            ValueError: ``high`` is not between 1 and 2^63 - 1.
        """
        if not 1 <= high < 2**63:
            raise ValueError("the range must hold between 1 and 2^63 - 1 numbers")
        out = np.empty(n, np.int64)
        # Words at or above the largest multiple of ``high`` are thrown away; that is what makes
        # the rest unbiased, and it happens less than once in two words.
        limit = np.uint64(2**64 - 2**64 % high - 1)
        filled = 0
        while filled < n:
            drawn = self.words(n - filled)
            kept = drawn[drawn <= limit] % np.uint64(high)
            out[filled : filled + len(kept)] = kept.astype(np.int64)
            filled += len(kept)
        return out

    def shuffle(self, values: Sequence[T]) -> list[T]:
        """Return the values in random order (Fisher-Yates)."""
        shuffled = list(values)
        for last in range(len(shuffled) - 1, 0, -1):
            other = int(self.integers(last + 1, 1)[0])
            shuffled[last], shuffled[other] = shuffled[other], shuffled[last]
        return shuffled

    def normal(
        self, n: int, std: float = 1.0, *, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """Return ``n`` independent normal numbers of mean 0 and standard deviation ``std``.

        Box and Muller 1958 in float64 on 53-bit uniforms. The largest magnitude is
        sqrt(106 ln 2) = 8.57 standard deviations; a true Gaussian goes beyond with chance 1e-17.
        This approximates an ideal Gaussian; the caller rounds to a grid, so that no low bits of a
        floating-point number are shown (Mironov 2012).

        Raises:
            ValueError: ``std`` is negative or not finite.
        """
        if not (math.isfinite(std) and std >= 0):
            raise ValueError("a standard deviation is finite and not negative")
        out = torch.empty(n, dtype=dtype)
        for start in range(0, n, _CHUNK):
            part = out[start : start + _CHUNK]
            half = (len(part) + 1) // 2
            words = torch.frombuffer(self._fill(2 * half), dtype=torch.int64, count=2 * half)
            uniform = words.bitwise_right_shift_(11).bitwise_and_(_MASK).to(torch.float64)
            # Zero would have an infinite logarithm, so the radius takes (0, 1].
            radius = uniform[:half].add_(1).mul_(_UNIT).log_().mul_(-2 * std * std).sqrt_()
            angle = uniform[half:].mul_(2 * math.pi * _UNIT)
            part[:half] = torch.cos(angle).mul_(radius)
            part[half:] = torch.sin(angle).mul_(radius)[: len(part) - half]
        return out
