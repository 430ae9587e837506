"""Signatures under a study: only the right key under the very study counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloister_fl.cli import main
from cloister_fl.errors import FileUnreadable, MessageInvalid
from cloister_fl.membership.identity import Identity
from cloister_fl.study import signatures
from support.federations import study, study_text

ONE, TWO = Identity.generate(), Identity.generate()
OTHER = study(study='name = "other"')


def test_what_is_signed_is_the_label_and_the_study_s_hash() -> None:
    """Checked with the library alone, from the framing as the format's description has it."""
    entry = signatures.sign(study(), ONE)
    label, digest = b"cloister/study-signature/v1", bytes.fromhex(study().digest)
    framed = b"".join(len(part).to_bytes(8, "big") + part for part in (label, digest))
    Ed25519PublicKey.from_public_bytes(entry[:32]).verify(entry[32:], framed)
    assert len(entry) == 96


def test_only_a_signature_under_the_very_study_counts() -> None:
    good, second = signatures.sign(study(), ONE), signatures.sign(study(), TWO)
    assert signatures.signers(study(), b"") == ()
    assert signatures.signers(study(), good + second) == (ONE.public, TWO.public)
    assert signatures.signers(study(), good + good) == (ONE.public,)
    assert signatures.signers(OTHER, good) == ()
    assert signatures.signers(study(), TWO.public + good[32:]) == ()
    for place in range(32, 96):
        flipped = bytearray(good)
        flipped[place] ^= 1
        assert signatures.signers(study(), bytes(flipped)) == ()


def test_a_key_of_small_order_vouches_for_nothing() -> None:
    # The neutral point as key and as R with s = 0 satisfies the equation for every message.
    neutral = (1).to_bytes(32, "little")
    assert signatures.signers(study(), neutral + neutral + bytes(32)) == ()


@pytest.mark.parametrize("size", [1, 95, 97, 96 * 17])
def test_another_form_is_refused(size: int) -> None:
    with pytest.raises(MessageInvalid):
        signatures.signers(study(), bytes(size))


def test_a_file_of_signatures_grows_by_signer_and_fits_its_study(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    assert signatures.load(file, study()) == b""
    assert signatures.add(file, study(), ONE) == 1
    assert signatures.add(file, study(), TWO) == 2
    assert signatures.add(file, study(), ONE) == 2
    entries = signatures.load(file, study())
    assert signatures.signers(study(), entries) == (ONE.public, TWO.public)
    with pytest.raises(FileUnreadable, match="does not match this study"):
        signatures.load(file, OTHER)
    with pytest.raises(FileUnreadable, match="does not match this study"):
        signatures.add(file, OTHER, ONE)


@pytest.mark.parametrize("text", ["", "\n", "words\n", f"{'0' * 64} {'0' * 127}\n"])
def test_another_file_is_no_file_of_signatures(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.toml.sig").write_text(text)
    with pytest.raises(FileUnreadable, match="not a file of signatures"):
        signatures.load(tmp_path / "study.toml", study())


def test_a_full_file_takes_no_more(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    for number in range(signatures.MAX_SIGNATURES):
        assert signatures.add(file, study(), Identity.generate()) == number + 1
    with pytest.raises(FileUnreadable, match="full"):
        signatures.add(file, study(), ONE)
    assert len(signatures.load(file, study())) == 96 * signatures.MAX_SIGNATURES


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main.main(["study", *arguments])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_the_commands_make_a_key_and_sign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, key = tmp_path / "study.toml", tmp_path / "sponsor.pem"
    file.write_text(study_text())
    status, out, _ = _run(capsys, "key", str(key))
    public = out.splitlines()[-1]
    assert status == 0
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    status, _, err = _run(capsys, "key", str(key))
    assert (status, err[:8]) == (2, "CLO-104:")
    assert key.read_bytes() == before
    status, out, _ = _run(capsys, "sign", str(file), "--key", str(key))
    assert status == 0
    assert public in out
    assert study().digest in out
    entries = signatures.load(file, study())
    assert signatures.signers(study(), entries) == (bytes.fromhex(public),)
    key.chmod(0o644)
    status, _, err = _run(capsys, "sign", str(file), "--key", str(key))
    assert (status, err[:8]) == (2, "CLO-103:")
