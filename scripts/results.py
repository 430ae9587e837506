"""Train the Kermany radiographs federated, at each hospital alone, and pooled without privacy.

Each row is a run of ``cloister simulate`` in this process, so the features of an image are
computed once. Results come after every run, in OUT/results.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.data.loading import load_cohort
from cloister_fl.client.site.folder import open_site
from cloister_fl.client.training.evaluation import answers_for
from cloister_fl.metrics.classification import measure
from cloister_fl.model_file import load_model
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.file import load_study
from cloister_fl.study.schema import Study
from cloister_fl.system.git_ignore import keep_out_of_git

STUDY = Path(__file__).parents[1] / "docs" / "studies" / "pneumonia-pretrained.toml"
EPSILONS = (3.0, 1.0)
SEEDS = (0, 1, 2)


def variant(study: Study, table: str, **values: object) -> Study:
    """The study with some keys of one table changed."""
    form = study.model_dump()
    form[table] |= values
    return Study.model_validate(form)


def alone(study: Study) -> Study:
    """The study for one hospital, where there is nothing to mask."""
    return variant(study, "aggregation", min_sites=1, secure=False)


def runs(data: Path, work: Path) -> Iterator[tuple[str, Study, Path]]:
    """Every run: its name, its study and its folder of sites, what matters most first."""
    study = load_study(STUDY)
    for seed in SEEDS:
        for epsilon in EPSILONS:
            made = variant(variant(study, "training", seed=seed), "privacy", epsilon=epsilon)
            yield f"federated-{epsilon:g}-{seed}", made, data / "sites"
    # One hospital that has everybody: mean loss in place of a clipped sum, so another rate.
    pooled = variant(alone(study), "privacy", enabled=False)
    pooled = variant(pooled, "training", learning_rate=300.0)
    yield (
        "pooled",
        variant(pooled, "evaluation", site_fraction=0.0),
        pool(data / "sites", work / "pooled"),
    )
    for hospital in sorted(path.name for path in (data / "sites").iterdir()):
        only = work / f"only-{hospital}"
        only.mkdir()
        (only / hospital).symlink_to((data / "sites" / hospital).absolute())
        for epsilon in EPSILONS:
            yield f"{hospital}-{epsilon:g}", variant(alone(study), "privacy", epsilon=epsilon), only


def pool(sites: Path, folder: Path) -> Path:
    """Put the patients of all hospitals into one."""
    rows: list[list[str]] = []
    for site in sorted(sites.iterdir()):
        shutil.copytree(site / "dicom", folder / "all" / "dicom" / site.name, copy_function=_link)
        with (site / "labels.csv").open(newline="", encoding="utf-8") as file:
            head, *more = csv.reader(file)
            rows += more
    with (folder / "all" / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def by_image(out: Path, study: Study) -> float:
    """AUROC over the single images of the hold-out."""
    cohort: Cohort = load_cohort(open_site(out / "holdout"), study)
    module, _ = load_model(out / "model.safetensors")
    found = measure(cohort.targets, answers_for(module, cohort, study.task)).auroc
    assert found is not None
    return found.value


def main() -> None:
    """Make every run and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with sites/ and holdout/")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--only", default="", help="runs whose name begins so")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    keep_out_of_git(options.out)
    with tempfile.TemporaryDirectory(dir=options.out) as work:
        for name, study, sites in runs(options.data, Path(work)):
            if not name.startswith(options.only):
                continue
            out = options.out / name
            summary = run_simulation(
                Simulation(study, sites, out, holdout=options.data / "holdout")
            )
            row = {
                "run": name,
                "epsilon": summary["epsilon_max"],
                "auroc_by_image": round(by_image(out, study), 4),
                "auroc_by_patient": round(float(str(summary["auroc_final"])), 4),
                "seconds": summary["seconds"],
            }
            with (options.out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
