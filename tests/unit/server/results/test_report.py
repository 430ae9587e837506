"""The report: true, complete in itself, and safe to open."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cloister_fl.errors import OutputInTheWay
from cloister_fl.metrics.figures import Estimate, Metrics
from cloister_fl.server.results.report import RunReport, SiteRow, render, write_report
from cloister_fl.server.rounds.checkpoint import Figures
from cloister_fl.study.schema import Study
from support import studies

pytestmark = pytest.mark.process


QUESTION = "Does the radiograph show a pulmonary nodule?"
VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


def study(
    *,
    private: bool = True,
    question: str = QUESTION,
    classes: tuple[str, ...] = ("normal", "nodule"),
) -> Study:
    return studies.study(
        study={"name": "nodule", "question": question},
        target={"classes": classes},
        training={"rounds": 3},
        privacy={"enabled": private},
    )


def metrics(area: float, counts: tuple[int, ...] = (12, 8)) -> Metrics:
    return Metrics(
        {
            "auroc": Estimate(area, area - 0.04, area + 0.03),
            "auprc": Estimate(area - 0.1, area - 0.2, area),
            "balanced_accuracy": Estimate(area - 0.2, area - 0.3, area),
        },
        sum(counts),
        counts,
    )


def report(
    *,
    private: bool = True,
    areas: tuple[float | None, ...] = (0.52, 0.7, 0.81, 0.9),
    summary: Mapping[str, object] | None = None,
    **changes: object,
) -> RunReport:
    rounds = [
        Figures(
            round=number,
            metrics=None if area is None else metrics(area),
            update_norm=0.25 * number,
            sites=5 if number else 0,
            seconds=20.0 if number else 0.0,
            epsilon=0.9 * number if private else None,
        )
        for number, area in enumerate(areas)
    ]
    sites = [
        SiteRow("north", 3, 4_200_000, 2.7 if private else None, None),
        SiteRow("east", 3, 4_100_000, 2.7 if private else None, None),
        SiteRow("west", 0, 310, 0.0 if private else None, "its policy does not allow the study"),
    ]
    made = RunReport(study(private=private), summary or {}, rounds, sites, (), ())
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def drawn() -> None:
    """Asked for by a test that needs the plots themselves; drawing takes most of the time."""


@pytest.fixture(autouse=True)
def _plots_are_blank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("cloister_fl.server.results.report_plots._svg", lambda *_: "data:,")


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def text_of(made: RunReport) -> str:
    return Page(render(made)).text


# Complete in itself


@pytest.mark.parametrize("private", [True, False])
def test_nothing_is_fetched_and_nothing_runs(private: bool, drawn: None) -> None:
    html = render(report(private=private, lost_rounds=(2,), warnings=("A warning.",)))
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "a", "base", "video"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("href", "action") for name in attributes)
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    policy = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_the_plots_fetch_nothing_either(drawn: None) -> None:
    page = Page(render(report()))
    sources = [image["src"] for image in page.all("img")]
    sources += [source["srcset"] for source in page.all("source")]
    assert len(sources) == 4
    for source in sources:
        svg = base64.b64decode(source.partition(",")[2]).decode()
        assert "<script" not in svg
        links = re.findall(r'(?:href|src)="([^"]*)"', svg) + re.findall(r"url\(([^)]*)\)", svg)
        assert all(link.startswith("#") for link in links)


def test_plots_have_words_for_those_who_do_not_see_them() -> None:
    alts = [image["alt"] for image in Page(render(report())).all("img")]
    assert len(alts) == 2
    assert "0.520 at round 0, 0.900 at round 3, 95 % interval 0.860 to 0.930" in alts[0]
    assert "2.70 at round 3, of 3 that the study allows" in alts[1]


def test_it_reads_well_on_a_phone_in_the_dark_and_by_keyboard() -> None:
    html = render(report())
    page = Page(html)
    assert any(m.get("name") == "viewport" for m in page.all("meta"))
    assert "@media (prefers-color-scheme: dark)" in html
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    scrolled = [d for d in page.all("div") if d.get("class") == "scroll"]
    assert len(scrolled) >= len(page.all("table"))
    assert all(d["tabindex"] == "0" and d["aria-label"] for d in scrolled)
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(drawn: None) -> None:
    assert render(report()) == render(report())


# Escaping


@pytest.mark.parametrize(
    "attack",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}{% raw %}"],
)
def test_what_comes_from_outside_is_escaped(attack: str) -> None:
    made = report(
        study=study(question=attack),
        sites=[SiteRow(attack, 1, 1, 1.0, None), SiteRow("x" + attack, 0, 1, 0.0, attack)],
        warnings=(attack,),
        summary={"run": attack, attack: attack, "note": [attack, attack]},
    )
    page = Page(render(made))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script"})
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert page.text.count(" ".join(attack.split())) >= 8
    assert "49" not in Page(render(report(study=study(question="{{ 7 * 7 }}")))).pieces


# The verdict


def test_the_verdict_gives_auroc_before_and_after() -> None:
    text = text_of(report())
    assert QUESTION in text
    assert "AUROC 0.520 → 0.900 95 % interval 0.860 to 0.930" in text
    assert "ranks them correctly about 90 times in 100" in text
    assert "The whole interval lies above the model's 0.520 before training." in text
    assert "Measured on 20 patients: normal 12, nodule 8." in text
    assert "Rounds 3 of 3" in text
    assert "Time 1 min 00 s" in text


def test_the_verdict_does_not_boast() -> None:
    text = text_of(report(areas=(0.5, 0.51, 0.52, 0.53)))
    assert "does not rule out chance" in text
    text = text_of(report(areas=(0.88, 0.89, 0.9, 0.9)))
    assert "does not rule out that training gained nothing over 0.880" in text


def test_without_a_measurement_it_says_so() -> None:
    made = report(areas=(None, None, None, None))
    text = text_of(made)
    assert "No AUROC was measured." in text
    assert "sites send no figures about their patients" in text
    assert len(Page(render(made)).all("img")) == 1
    assert "n/a" in text
    assert "No AUROC was measured." in text_of(report(areas=()))
    assert "No AUROC was measured." in text_of(report(areas=(0.5,)))


def test_figures_of_some_rounds_only() -> None:
    text = text_of(report(areas=(0.5, None, 0.8, None)))
    assert "AUROC 0.500 → 0.800" in text


def test_more_than_two_classes() -> None:
    rounds = [Figures(0, 5, 1.0, 0.1, metrics=metrics(0.6, (4, 5, 6)))]
    rounds.append(replace(rounds[0], round=1))
    text = text_of(report(study=study(classes=("a", "b", "c")), rounds=rounds))
    assert "averaged over the 3 classes" in text
    assert "ranks them correctly" not in text


# Privacy and what left


@pytest.mark.parametrize("private", [True, False])
def test_a_run_that_ended_early_says_so_beside_its_result(private: bool) -> None:
    text = text_of(report(private=private, summary={"ended": "stop_after"}))
    said = "The run ended before its last round: as many evaluations in a row"
    assert said in text
    assert ("The study's ε is that of all its rounds." in text) is private
    assert said not in text_of(report(private=private, summary={"ended": "done"}))


def test_the_promise_in_plain_words() -> None:
    text = text_of(report())
    assert "Patient-level differential privacy: ε = 2.70 at δ = 1e-5" in text
    assert "adding or removing one patient with all of their images" in text
    assert "more than 15 times as likely" in text  # e^2.7 = 14.9
    assert "What it does not promise" in text
    assert "treated at two of the hospitals" in text
    assert "number of patients, losses" in text


def test_without_privacy_it_says_so_and_promises_nothing() -> None:
    text = text_of(report(private=False))
    assert "There was no differential privacy." in text
    assert "Privacy cost none" in text
    assert "What it promises" not in text
    assert "ε" not in text
    assert "score histogram" in text
    assert "the number of patients" not in text


UNMASKED = "secure aggregation was off: the coordinator could read each site's update"


@pytest.mark.parametrize("said", [{}, {"secure_aggregation": False}, {"secure_aggregation": "yes"}])
def test_updates_count_as_unmasked_unless_it_is_said_that_they_are_not(
    said: Mapping[str, object],
) -> None:
    text = text_of(report(summary=said))
    assert UNMASKED in text
    assert "Secure aggregation no" in text
    assert "secure aggregation was on" not in text
    assert "Nothing else protected them." in text_of(report(private=False, summary=said))


def test_with_secure_aggregation_it_says_so() -> None:
    text = text_of(report(summary={"secure_aggregation": True}))
    assert "No: secure aggregation was on." in text
    assert "Secure aggregation yes" in text
    assert UNMASKED not in text


def test_each_site_has_its_row() -> None:
    text = text_of(report())
    assert "north 3 4.2 MB 2.70 took part" in text
    assert "west 0 310 bytes 0.00 refused: its policy does not allow the study" in text
    assert "Site west refused: its policy does not allow the study." in text
    assert "Sent by the sites 8.3 MB" in text
    assert "Sites 2" in text
    late = report(sites=[SiteRow("north", 2, 999_999, 1.8, "it declined.")])
    assert "north 2 1000.0 kB 1.80 its last answer was a refusal: it declined" in text_of(late)


def test_lost_rounds_and_warnings_are_told() -> None:
    text = text_of(report(lost_rounds=(2,), warnings=("Round 3 was odd.",)))
    assert (
        "Round 2 was sent out and never finished. The privacy cost of what was started stays "
        "charged at the sites." in text
    )
    assert "Round 3 was odd." in text
    assert "Rounds 1, 2 were sent out" in text_of(report(lost_rounds=(2, 1)))
    assert "charged all the same" not in text_of(report(private=False, lost_rounds=(2,)))


def test_settings_are_listed_and_the_model_explained() -> None:
    made = report(summary={"run": "ab12", "epsilon_max": 2.7})
    text = text_of(made)
    assert "training.expected_batch 64" in text
    assert "privacy.delta 1e-5" in text
    assert "target.classes normal, nodule" in text
    assert "input.window not set" in text
    assert made.study.digest in text
    assert "cloister predict model.safetensors" in text
    assert "run ab12" in text
    assert "epsilon_max" not in text
    assert "It is not a medical device" in text


# Writing


def test_it_is_written_whole_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, report())
    assert path.read_text("utf-8") == render(report())
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_crash_while_writing_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OutputInTheWay, match="No space left"):
        write_report(path, report())
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_importing_it_is_cheap() -> None:
    code = (
        "import sys, cloister_fl.server.results.report;"
        "print([n for n in ('matplotlib', 'jinja2', 'torch') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
