"""Merkle trees: the published example, every path, and no other."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister_fl.secagg.crypto import hashes


def rows_of(count: int) -> list[bytes]:
    return [f"row {number}".encode() for number in range(count)]


def test_the_tree_of_rfc_6962() -> None:
    """The eight inputs and the roots of Certificate Transparency's own reference tests."""
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657"]
    inputs.append("606162636465666768696a6b6c6d6e6f")
    rows = [bytes.fromhex(text) for text in inputs]
    known = {
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    for count, root in known.items():
        assert hashes.levels(rows[:count])[-1][0].hex() == root


@pytest.mark.parametrize("count", [*range(1, 18), 100, 1000])
def test_every_row_proves_itself_and_at_its_own_place_only(count: int) -> None:
    rows = rows_of(count)
    tree = hashes.levels(rows)
    root, paths = tree[-1][0], hashes.paths(tree)
    for index in (*range(min(count, 20)), count - 1):
        path = paths[index]
        assert hashes.root_from(rows[index], index, count, path) == root
        assert hashes.root_from(rows[index] + b"!", index, count, path) != root
        assert hashes.root_from(rows[index], index, count, path + bytes(32)) is None
        if path:
            assert hashes.root_from(rows[index], index, count, path[:-32]) != root
            other = index ^ 1
            assert hashes.root_from(rows[index], other, count, path) != root
        assert hashes.root_from(rows[index], count, count, path) is None


def test_a_node_is_not_taken_for_a_row() -> None:
    rows = rows_of(4)
    tree = hashes.levels(rows)
    node = tree[0][0] + tree[0][1]
    assert hashes.root_from(node, 0, 2, tree[1][1]) != tree[-1][0]
    assert hashlib.sha256(b"\1" + node).digest() == tree[1][0]


@given(st.binary(max_size=400), st.integers(0, 1100), st.integers(0, 1100))
def test_any_path_is_read_or_refused(path: bytes, index: int, count: int) -> None:
    found = hashes.root_from(b"row", index, count, path)
    assert found is None or (len(found) == 32 and len(path) % 32 == 0)
