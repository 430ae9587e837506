"""The images' recipe and the compose file, as far as they can be judged without Docker."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
RECIPE = DOCKER / "Dockerfile"
HOSPITALS = ("northgate", "riverside", "hillcrest", "eastfield", "lakeview")
SECRET = re.compile(r"secret|token|password|passwd|credential|private|_key|key_|invite", re.I)
BASE = re.compile(r"python:3\.11-slim-bookworm(@sha256:[0-9a-f]{64})?")


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).parent / "hadolint"
    found = str(beside) if beside.exists() else shutil.which("hadolint")
    assert found, "hadolint is missing: scripts/test installs it, for it is in no extra"
    command = [found, "--no-color", "--failure-threshold", "style", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def stages(text: str) -> dict[str, list[str]]:
    """The instructions of each stage, a line each, with those of the stage that it stands on."""
    made: dict[str, list[str]] = {}
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    name = ""
    for line in filter(None, map(str.strip, joined.splitlines())):
        if begins := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            name = begins[2]
            made[name] = list(made.get(begins[1], [])) if begins[1] in made else [line]
        else:
            made[name].append(line)
    return made


def last(lines: list[str], instruction: str) -> str:
    """The argument of the last instruction of a kind: the one that holds."""
    found = [line for line in lines if line.split()[0] == instruction]
    assert found, f"no {instruction}"
    return found[-1].split(maxsplit=1)[1]


def test_the_linter_is_content() -> None:
    done = hadolint(RECIPE.read_text())
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("python:3.11-slim-bookworm", "python:latest", "DL3007"),
        (" --no-cache-dir", "", "DL3042"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ("WORKDIR /site", "WORKDIR site", "DL3000"),
    ],
)
def test_the_linter_sees_what_is_wrong(old: str, new: str, code: str) -> None:
    text = RECIPE.read_text()
    assert old in text
    done = hadolint(text.replace(old, new))
    assert done.returncode == 1
    assert code in done.stdout


@pytest.mark.parametrize(("side", "extra"), [("coordinator", "server"), ("hospital", "client")])
def test_an_image_runs_as_nobody_and_says_whether_it_serves(side: str, extra: str) -> None:
    made = stages(RECIPE.read_text())[side]
    assert last(made, "USER") == "10001:10001"
    assert last(made, "STOPSIGNAL") == "SIGTERM"
    folder = "state" if side == "coordinator" else "run"
    assert last(made, "HEALTHCHECK").endswith(
        f'CMD ["python", "-I", "-m", "cloister_fl.system.health", "{folder}/health"]'
    )
    assert last(made, "ENTRYPOINT") == '["cloister"]'
    assert last(made, "CMD") == f'["{extra}", "start"]'
    assert last(made, "WORKDIR") == last(made, "VOLUME")
    assert f"install -d -m 0700 -o 10001 -g 10001 {last(made, 'WORKDIR')}" in last(made, "RUN")
    # The other side's parts are not in it.
    (copied,) = [line for line in made if line.startswith("COPY")]
    source = re.match(r"COPY --from=(\S+)", copied)
    assert source is not None
    installed = stages(RECIPE.read_text())[source[1]][-1]
    assert re.search(rf"/wheel/\*\.whl\)\[{extra}[\],]", installed)
    assert "-c constraints.txt -c constraints-torch.txt" in " ".join(installed.split())


def test_images_stand_on_one_pinned_base_and_hold_no_secret() -> None:
    text = RECIPE.read_text()
    bases = set(re.findall(r"(?m)^FROM (\S+)", text)) - set(stages(text))
    assert len(bases) == 1
    assert all(BASE.fullmatch(base) for base in bases)
    given = re.findall(r"(?m)^(?:ARG|ENV) (.*(?:\\\n.*)*)", text)
    assert given
    assert not [each for each in given if SECRET.search(each)]
    for stage in stages(text).values():
        # Nothing is fetched but by pip, and nothing is added from an address.
        assert not [line for line in stage if re.match(r"ADD |RUN .*\b(curl|wget)\b", line)]


def test_the_wheel_can_be_made_of_what_docker_is_given(tmp_path: Path) -> None:
    rules = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert [rule for rule in rules if rule and rule[0] not in "#!"] == ["*", "**/__pycache__"]
    for rule in rules:
        if rule.startswith("!"):
            source, target = ROOT / rule[1:], tmp_path / rule[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
    wanted = {
        name
        for line in stages(RECIPE.read_text())["wheel"]
        for name in line.split()[1:-1]
        if line.startswith("COPY") and not name.startswith("-")
    }
    assert {f"!{name}" for name in wanted} <= set(rules)
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "made", tmp_path]
    done = subprocess.run(
        [sys.executable, *map(str, build)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "made").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "cloister_fl/client/flower/executor.py",
        "cloister_fl/server/service/run_executor.py",
        "cloister_fl/cli/errors_explained/CLO-101.md",
    } <= names


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DOCKER / "compose.yaml").read_text()))


def test_compose_has_a_coordinator_and_five_hospitals(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"coordinator", *HOSPITALS}
    targets = set(stages(RECIPE.read_text()))
    for name, service in compose["services"].items():
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == RECIPE
        assert build["target"] in targets
        assert build["target"] == ("coordinator" if name == "coordinator" else "hospital")


@pytest.mark.parametrize("name", ["coordinator", *HOSPITALS])
def test_a_service_can_do_little(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"] == {"core": 0, "nofile": 4096}
    assert service["pids_limit"] == 1024
    assert ("mem_limit" in service) == (name == "coordinator")
    assert not set(service) & {
        "privileged", "cap_add", "network_mode", "pid", "ipc", "devices", "env_file",
        "environment", "secrets", "configs", "command", "entrypoint", "healthcheck", "extends",
    }  # fmt: skip
    (scratch,) = service["tmpfs"]
    assert scratch.startswith("/tmp:")
    assert {"nosuid", "nodev", "noexec"} <= set(scratch.partition(":")[2].split(","))
    own, *data = service["volumes"]
    volume, place = own.split(":")
    assert volume == name
    assert volume in compose["volumes"]
    folder = "/federation" if name == "coordinator" else "/site"
    assert place == folder == last(stages(RECIPE.read_text())[service["build"]["target"]], "VOLUME")
    # A hospital's data are its own, and cannot be written.
    wanted = [] if name == "coordinator" else [f"/{name}:/data:ro"]
    assert [re.sub(r"^\$\{CLOISTER_DATA:\?[^}]*\}", "", each) for each in data] == wanted


def test_only_the_coordinators_two_ports_are_published(compose: dict[str, Any]) -> None:
    exposed = last(stages(RECIPE.read_text())["coordinator"], "EXPOSE").split()
    published = {n: s.get("ports", []) for n, s in compose["services"].items()}
    assert published.pop("coordinator") == [f"{port}:{port}" for port in exposed]
    assert not any(published.values())
    assert "EXPOSE" not in " ".join(stages(RECIPE.read_text())["hospital"])


def test_hospitals_do_not_reach_each_other(compose: dict[str, Any]) -> None:
    networks = {name: set(s["networks"]) for name, s in compose["services"].items()}
    assert networks.pop("coordinator") == set(HOSPITALS) == set(compose["networks"])
    assert networks == {name: {name} for name in HOSPITALS}


def test_no_secret_stands_in_the_compose_file(compose: dict[str, Any]) -> None:
    def words(node: Any) -> list[str]:
        if isinstance(node, dict):
            return [*map(str, node), *(w for each in node.values() for w in words(each))]
        return [w for each in node for w in words(each)] if isinstance(node, list) else [str(node)]

    assert not [word for word in words(compose) if SECRET.search(word)]
