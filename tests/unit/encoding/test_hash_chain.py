"""Hash chains: hashes that logs and ledgers of hospitals stand on already."""

from __future__ import annotations

import pytest

from cloister_fl.encoding.hash_chain import GENESIS, HASH, entry_hash

# The hashes below are those of coreutils' sha256sum.
TEXT = '{"kind":"asked","seq":1}'


def test_an_entry_of_the_audit_log_holds_the_hash_before_it() -> None:
    expected = "e07681c56317687a24360813eb3cae4d2eec968f38f23eeb3aef1c6fd5016e51"
    assert entry_hash(b"cloister/audit/v1\0", TEXT) == expected


def test_an_entry_of_the_ledger_has_the_hash_before_it_beside() -> None:
    expected = "419991693b34d0ceefa4807519bf4f303969f87084d6d2d5cc02aca9aa43cc8d"
    assert entry_hash(b"cloister/ledger/v1\0", TEXT, beside=GENESIS) == expected


def test_label_text_and_predecessor_all_count() -> None:
    hashes = {
        entry_hash(label, text, beside=before)
        for label in (b"a\0", b"b\0")
        for text in (TEXT, TEXT + " ")
        for before in (None, GENESIS, "1" * 64)
    }
    assert len(hashes) == 12
    assert all(HASH.fullmatch(one) for one in hashes)


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "0" * 63 + "A", "0" * 63 + "\u0663"])
def test_what_is_no_hash(text: str) -> None:
    assert HASH.fullmatch(text) is None
    assert HASH.fullmatch(GENESIS)
