"""The site folder: what is created once, what is refused, and pseudonyms."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister_fl.client.site.folder import init_site, open_site, pseudonym
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import FileUnreadable, OptionInvalid, OutputInTheWay, SiteFileInvalid
from cloister_fl.system.files import create_secret, make_private_dir, read_secret, write_atomic
from support.errors import raises

KEYS = ("identity.pem", "pseudonym.key", "cache.key")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_init_creates_everything_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        site = init_site(tmp_path / "Nord Klinik")
    finally:
        os.umask(old)
    assert site.name == "nord-klinik"
    assert site.dicom == site.root / "dicom"
    assert site.labels == site.root / "labels.csv"
    for folder in (site.root, site.keys, site.cache, site.audit):
        assert _mode(folder) == 0o700
    for key in KEYS:
        assert _mode(site.keys / key) == 0o600
    assert len(site.pseudonym_key()) == len(site.cache_key()) == 32
    assert site.pseudonym_key() != site.cache_key()
    assert not list(site.root.rglob("*.tmp"))


def test_init_again_replaces_nothing(tmp_path: Path) -> None:
    site = init_site(tmp_path, name="first")
    with (tmp_path / "site.toml").open("a") as file:
        file.write("# by hand\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = init_site(
        tmp_path, name="second", policy=Policy(patients_at_most=1_000, max_epsilon_study=1.0)
    )
    assert again == site
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_init_mends_what_is_missing_and_keeps_the_rest(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    kept = site.pseudonym_key()
    (site.keys / "cache.key").unlink()
    site.cache.rmdir()
    again = init_site(tmp_path)
    assert again.pseudonym_key() == kept
    assert len(again.cache_key()) == 32
    assert again.cache.is_dir()


def test_written_policy_and_paths_come_back(tmp_path: Path) -> None:
    policy = Policy(
        max_epsilon_study=0.5,
        ledger_delta=1e-7,
        patients_at_most=20_000,
        min_patients=1,
        min_patients_per_class=3,
        allow_without_privacy=True,
        networks=("small-cnn", "resnet18"),
        modalities=("CT",),
    )
    odd = 'a "b" \\ ü\x7f'
    site = init_site(tmp_path, dicom=odd, labels=tmp_path / "x.csv", policy=policy)
    assert site.policy == policy
    assert site.dicom == tmp_path / odd
    assert site.labels == tmp_path / "x.csv"
    assert open_site(tmp_path) == site


@pytest.mark.parametrize("name", ["", "Nord", "a b", "-a", "x" * 64, 'a"\n'])
def test_bad_name(tmp_path: Path, name: str) -> None:
    with raises(OptionInvalid):
        init_site(tmp_path / "new", name=name)
    assert not (tmp_path / "new").exists()


def test_path_that_no_toml_can_hold(tmp_path: Path) -> None:
    with raises(OptionInvalid):
        init_site(tmp_path, dicom="a\udcff")


def test_open_lists_all_faults(tmp_path: Path) -> None:
    init_site(tmp_path)
    (tmp_path / "site.toml").write_text(
        '[site]\nname = "A"\n[data]\ndicm = "x"\n[policy]\nmin_sites = 0\nmodalities = ["XX"]\n'
    )
    with pytest.raises(SiteFileInvalid) as caught:
        open_site(tmp_path)
    faults = {(fault.line, fault.key) for fault in caught.value.faults}
    assert faults == {
        (2, "site.name"),
        (4, "data.dicm"),
        (6, "policy.min_sites"),
        (7, "policy.modalities.0"),
    }


def test_a_policy_names_networks_that_there_are(tmp_path: Path) -> None:
    init_site(tmp_path)
    path = tmp_path / "site.toml"
    path.write_text(path.read_text().replace("networks = []", 'networks = ["unet", "unett"]'))
    with pytest.raises(SiteFileInvalid, match="'unett', which is not a network") as caught:
        open_site(tmp_path)
    assert "Did you mean 'unet'?" in str(caught.value)
    assert [fault.key for fault in caught.value.faults] == ["policy.networks"]


def test_nothing_but_a_file_is_replaced(tmp_path: Path) -> None:
    """As root, a rename would put a file in the place of a device."""
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder):
        before = path.stat()
        with pytest.raises(OutputInTheWay):
            write_atomic(path, b"x")
        assert path.stat().st_mode == before.st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
    file = tmp_path / "file"
    write_atomic(file, b"x")
    write_atomic(file, b"y")
    assert file.read_bytes() == b"y"


def test_open_without_a_site(tmp_path: Path) -> None:
    with pytest.raises(FileUnreadable):
        open_site(tmp_path)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_open_key_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    site = init_site(tmp_path)
    (site.keys / name).chmod(mode)
    with pytest.raises(FileUnreadable, match=f"{name} can be read or changed by others") as caught:
        open_site(tmp_path)
    assert "chmod 600" in str(caught.value)


@pytest.mark.parametrize("name", KEYS)
def test_linked_key_is_refused_and_not_followed(tmp_path: Path, name: str) -> None:
    site = init_site(tmp_path / "site")
    (site.keys / name).rename(tmp_path / "elsewhere")
    (site.keys / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileUnreadable, match="symbolic link"):
        open_site(site.root)
    with pytest.raises(FileUnreadable, match="symbolic link"):
        init_site(site.root)


def test_dangling_key_link_is_not_written_through(tmp_path: Path) -> None:
    site = init_site(tmp_path / "site")
    (site.keys / "cache.key").unlink()
    (site.keys / "cache.key").symlink_to(tmp_path / "planted")
    with pytest.raises(FileUnreadable, match="symbolic link"):
        init_site(site.root)
    assert not (tmp_path / "planted").exists()


def test_keys_of_the_wrong_kind(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    (site.keys / "cache.key").write_bytes(b"short")
    with pytest.raises(FileUnreadable, match=r"cache\.key does not hold 32 bytes"):
        open_site(tmp_path)
    (site.keys / "cache.key").write_bytes(bytes(32))
    other = generate_private_key(SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    for wrong in (other, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        (site.keys / "identity.pem").write_bytes(wrong)
        with pytest.raises(FileUnreadable, match=r"identity\.pem is not an Ed25519"):
            open_site(tmp_path)


def test_secrets_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(FileUnreadable, match="not a regular file"):
        read_secret(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(70_000))
    (tmp_path / "large").chmod(0o600)
    with pytest.raises(FileUnreadable, match="too large"):
        read_secret(tmp_path / "large")


def test_create_secret_never_replaces(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert create_secret(path, b"one")
    assert not create_secret(path, b"two")
    assert path.read_bytes() == b"one"


def test_create_secret_never_replaces_what_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"other process")
    monkeypatch.setattr(os.path, "lexists", lambda _path: False)
    assert not create_secret(path, b"two")
    assert path.read_bytes() == b"other process"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_leaves_the_old_file_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old", mode=0o640)
    assert _mode(path) == 0o640

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputInTheWay, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputInTheWay, match="file cannot be written"):
        write_atomic(tmp_path / "none" / "file", b"x")


def test_private_dir(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    make_private_dir(tmp_path / "open")
    assert _mode(tmp_path / "open") == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "open")
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        with pytest.raises(OutputInTheWay):
            make_private_dir(tmp_path / name)


def test_pseudonym_is_the_stated_hmac() -> None:
    fields = b"".join(len(x).to_bytes(8, "big") + x for x in (b"ab", b"issuer", b"id"))
    expected = hmac.new(b"k" * 32, b"cloister/pseudonym/v1\0" + fields, hashlib.sha256)
    assert pseudonym(b"k" * 32, "ab", "issuer", " id ") == expected.hexdigest()


def test_pseudonyms_differ_wherever_a_field_does() -> None:
    key = bytes(32)
    names = {
        pseudonym(key, "s", "i", "p"),
        pseudonym(bytes([1]) * 32, "s", "i", "p"),
        pseudonym(key, "t", "i", "p"),
        pseudonym(key, "s", "", "ip"),
        pseudonym(key, "s", "ip", ""),
        pseudonym(key, "si", "", "p"),
    }
    assert len(names) == 6
