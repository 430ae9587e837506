"""Faults of privacy that are planted in a copy of the package, for the audit of whole rounds.

Each is a patch of the source, anywhere between the app and the grid of the sum; the audit that a
hospital runs must refute the copy's claims.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("common", "server", "client")
APP = "client/cloister_fl/client/app.py"
TRAINING = "client/cloister_fl/client/training"
STEP = f"{TRAINING}/dp_optimizer.py"
ROUND = f"{TRAINING}/local_training.py"
SUM = f"{TRAINING}/exact_sum.py"
RANDOM = f"{TRAINING}/csprng.py"
BAGS = f"{TRAINING}/sampling.py"
NOISED = f"{TRAINING}/noised_evaluation.py"
GATE = "client/cloister_fl/client/admission/gate.py"
COST = "common/cloister_fl/study/cost.py"
CNN = "common/cloister_fl/networks/small_cnn.py"


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        name: it in words.
        file: what is patched, from the root of the repository.
        patches: pairs of a text that stands there once, and what takes its place.
        more: text that is put at the file's end.
    """

    name: str
    file: str
    patches: tuple[tuple[str, str], ...]
    more: str = ""

    def __str__(self) -> str:
        return self.name


_NOISE = "piece.add_(self._random.normal(len(piece), std).round_().to(torch.int64))"
_NOISY = "            if self.noise_multiplier > 0:\n"
_AFTER = "        position = 0\n        try:\n            for parameter in self.params:\n"
_STD = "        std = self.noise_multiplier * 2.0**GRID_BITS\n"
_SUMMED = "clipped_sum(blocks, self.size, self.max_grad_norm)"
_OPTIMIZER = "    optimizer = _optimizer(trained, study.training, round_number)\n"
_BAGS = "_draw(cohort, random, training)"
_BEFORE = "    before = flatten(module)\n"
_KEY = "    return os.urandom(32)"
_ROWS = """

def _rows(blocks, size):
    rows = [
        block if isinstance(block, Tensor) else torch.cat([p.reshape(-1) for p in block])[None]
        for block in blocks
    ]
    return torch.cat(rows) if rows else torch.zeros(0, size)
"""

MUTANTS = (
    Mutant(
        "1 noise in the first step only",
        STEP,
        (
            (_NOISY, "            if self.noise_multiplier > 0 and not hasattr(self, 'over'):\n"),
            (_AFTER, "        self.over = True\n" + _AFTER),
        ),
    ),
    Mutant(
        "2 one noise vector for all steps",
        STEP,
        (
            (
                _NOISE,
                "piece.add_(self.__dict__.setdefault(f'noise {piece.storage_offset()}', "
                "self._random.normal(len(piece), std)).round().to(torch.int64))",
            ),
        ),
    ),
    Mutant(
        "3 noise over the number of steps",
        ROUND,
        (
            (
                "        noise_multiplier=noise_multiplier,\n        max_grad_norm",
                "        noise_multiplier=noise_multiplier / steps,\n        max_grad_norm",
            ),
        ),
    ),
    Mutant(
        "4 clipping by layer",
        STEP,
        ((_SUMMED, "_by_layer(blocks, self)"),),
        _ROWS
        + """

def _by_layer(blocks, optimizer):
    parts = _rows(blocks, optimizer.size).split([p.numel() for p in optimizer.params], dim=1)
    return torch.cat([clipped_sum([p], p.shape[1], optimizer.max_grad_norm) for p in parts])
""",
    ),
    Mutant(
        "5 a tenth of the un-noised update added",
        STEP,
        ((_NOISE, _NOISE[:-1] + " + piece // 10)"),),
    ),
    Mutant(
        "6 the clip taken from the batch's median",
        STEP,
        ((_SUMMED, "_by_median(blocks, self)"),),
        _ROWS
        + """

def _by_median(blocks, optimizer):
    rows = _rows(blocks, optimizer.size)
    if not len(rows):
        return clipped_sum([], optimizer.size, 1.0)
    clip = max(float(rows.double().norm(dim=1).median()), 1e-9)
    total = clipped_sum([rows], optimizer.size, clip)
    return (total.double() * (clip / optimizer.max_grad_norm)).round().long()
""",
    ),
    Mutant(
        "7 learning rate times prevalence",
        ROUND,
        (
            (
                _OPTIMIZER,
                _OPTIMIZER
                + "    labels = [getattr(one, 'label', 0) for one in cohort.patients] or [1]\n"
                "    for group in optimizer.param_groups:\n"
                "        group['lr'] *= sum(one == 1 for one in labels) / len(labels)\n",
            ),
        ),
    ),
    Mutant(
        "8 float32 overflow unclipped",
        SUM,
        (
            (
                "        # Summing n squares errs",
                "        if torch.cat(parts).square().sum().isinf():\n"
                "            norm = 0.0\n"
                "        # Summing n squares errs",
            ),
        ),
    ),
    Mutant(
        "9 noise keyed by a counter",
        RANDOM,
        ((_KEY, "    return hashlib.sha256(b'noise %d' % next(_COUNT)).digest()"),),
        "\nimport hashlib\nimport itertools\n\n_COUNT = itertools.count()\n",
    ),
    Mutant(
        "10 sampling from a public seed",
        ROUND,
        (
            (
                _BEFORE,
                _BEFORE + "    public = SeededRandom(study.training.seed, site, round_number)\n"
                "    globals()['_PUBLIC'] = public\n",
            ),
            (_BAGS, "_draw(cohort, _PUBLIC, training)"),
        ),
    ),
    Mutant(
        "11 a moving average fed with un-noised updates",
        STEP,
        (
            (
                _STD,
                _STD + "        average = _AVERAGES.setdefault(len(total), torch.zeros(len(total), "
                "dtype=torch.float64))\n        average.mul_(0.9).add_(total, alpha=0.1)\n",
            ),
            (_AFTER, "        update.add_((average * scale * 0.1).float())\n" + _AFTER),
        ),
        "\n_AVERAGES = {}\n",
    ),
    Mutant(
        "12 momentum across rounds from un-noised gradients",
        STEP,
        (
            (
                _STD,
                _STD
                + "        momentum = self.original_optimizer.param_groups[0].get('momentum')\n"
                "        speed = _SPEEDS.setdefault(len(total), torch.zeros(len(total), "
                "dtype=torch.float64)).mul_(momentum or 0)\n"
                "        before = speed.clone()\n        speed.add_(total)\n",
            ),
            (_AFTER, "        update.add_((before * scale).float())\n" + _AFTER),
        ),
        "\n_SPEEDS = {}\n",
    ),
    Mutant(
        "13 noise truncated at 3 sigma",
        RANDOM,
        (
            (
                "            part[half:] = torch.sin(angle).mul_(radius)[: len(part) - half]\n",
                "            part[half:] = torch.sin(angle).mul_(radius)[: len(part) - half]\n"
                "            part.clamp_(-3 * std, 3 * std)\n",
            ),
        ),
    ),
    Mutant(
        "14 batch statistics in a network",
        CNN,
        (
            (
                "        logits: Tensor = self.head(self.pool(self.features(images)))\n",
                "        pooled = self.pool(self.features(images))\n"
                "        if len(images) > 2:\n"
                "            pooled = pooled - 0.1 * pooled.mean(dim=0)\n"
                "        logits: Tensor = self.head(pooled)\n",
            ),
        ),
    ),
)
"""One of each kind."""

VARIANTS = (
    Mutant(
        "noise in the last step only",
        ROUND,
        (
            (
                "        for _ in range(steps):\n            optimizer.step_on",
                "        sigma = optimizer.noise_multiplier\n"
                "        for step in range(steps):\n"
                "            optimizer.noise_multiplier = sigma * (step == steps - 1)\n"
                "            optimizer.step_on",
            ),
        ),
    ),
    Mutant(
        "each second noise is the one before with the other sign",
        RANDOM,
        (
            (
                "        out = torch.empty(n, dtype=dtype)\n",
                "        if getattr(self, 'last', None) is not None and len(self.last) == n:\n"
                "            out, self.last = -self.last, None\n"
                "            return out\n"
                "        out = torch.empty(n, dtype=dtype)\n",
            ),
            (
                "            part[half:] = torch.sin(angle).mul_(radius)[: len(part) - half]\n",
                "            part[half:] = torch.sin(angle).mul_(radius)[: len(part) - half]\n"
                "        self.last = out.clone()\n",
            ),
        ),
    ),
    Mutant(
        "noise shared out among the steps",
        APP,
        (
            (
                "charges.step.noise_multiplier if charges is not None else 0.0",
                "charges.step.noise_multiplier / study.training.steps_per_round**0.5 "
                "if charges is not None else 0.0",
            ),
        ),
    ),
    Mutant(
        "the last bias unclipped",
        STEP,
        ((_SUMMED, "_but_last(blocks, self)"),),
        _ROWS
        + """

def _but_last(blocks, optimizer):
    rows, last = _rows(blocks, optimizer.size), optimizer.params[-1].numel()
    parts = rows[:, :-last], rows[:, -last:]
    clips = optimizer.max_grad_norm, 1e4
    sums = [clipped_sum([p], p.shape[1], c) for p, c in zip(parts, clips)]
    sums[1] = (sums[1].double() * (clips[1] / clips[0])).round().long()
    return torch.cat(sums)
""",
    ),
    Mutant(
        "clipping image by image",
        BAGS,
        (
            (
                "            bags.append(Bag(images, moves))\n",
                "            bags += [Bag(images[i : i + 1], None if moves is None else "
                "moves[i : i + 1]) for i in range(len(images))]\n",
            ),
        ),
    ),
    Mutant(
        "a hundredth of training without noise in the update",
        APP,
        (
            (
                "        return train_round(\n            network,\n",
                "        return _mixed(\n            network,\n",
            ),
        ),
        """

def _mixed(network, cohort, study, *, noise_multiplier, **more):
    noised_delta = train_round(network, cohort, study, noise_multiplier=noise_multiplier, **more)
    if not noise_multiplier:
        return noised_delta
    almost = train_round(network, cohort, study, noise_multiplier=1e-9, **more)
    return (0.97 * noised_delta + 0.03 * almost).astype(np.float32)
""",
    ),
    Mutant(
        "a clip that follows the mean of the norms",
        STEP,
        ((_SUMMED, "_by_mean(blocks, self)"),),
        _ROWS
        + """

def _by_mean(blocks, optimizer):
    rows, most = _rows(blocks, optimizer.size), optimizer.max_grad_norm
    if not len(rows):
        return clipped_sum([], optimizer.size, 1.0)
    clip = min(most, max(float(rows.double().norm(dim=1).mean()), 1e-9))
    total = clipped_sum([rows], optimizer.size, clip)
    return (total.double() * (clip / most)).round().long()
""",
    ),
    Mutant(
        "losses weighted by how rare a class is at the site",
        ROUND,
        (
            (
                "    trained, seen = trained_part(local, cohort, study.training, told)\n",
                "    trained, seen = trained_part(local, cohort, study.training, told)\n"
                "    labels = [getattr(one, 'label', 0) for one in cohort.patients] or [1]\n"
                "    globals()['_RARE'] = 1.5 - sum(one == 1 for one in labels) / len(labels)\n",
            ),
            (
                "PatientGradSampleModule(module, study.task, engine=engine, told=told)",
                "PatientGradSampleModule(module, _Weighted(study.task), engine=engine, told=told)",
            ),
        ),
        """

class _Weighted:
    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        return getattr(self._task, name)

    def losses(self, logits, targets):
        return self._task.losses(logits, targets) * (1 + (_RARE - 1) * (targets == 1))
""",
    ),
    Mutant(
        "squares beyond float32 clip to a constant of the largest value",
        SUM,
        (
            (
                "        # Summing n squares errs",
                "        if torch.cat(parts).square().sum().isinf():\n"
                "            norm = max(float(part.abs().max()) for part in parts)\n"
                "        # Summing n squares errs",
            ),
        ),
    ),
    Mutant(
        "noise keyed by site and round",
        APP,
        (
            (
                "        random=SecureRandom() if charges is not None else None,\n",
                "        random=_keyed(site.name, round_number) if charges else None,\n",
            ),
        ),
        """

def _keyed(site, number):
    import hashlib

    from cloister_fl.client.training import csprng

    random = SecureRandom()
    key = hashlib.sha256(f"{site} {number}".encode()).digest()
    random._encryptor = csprng._keystream(key, bytes(16))
    return random
""",
    ),
    Mutant(
        "noise of one key for all sites, counted on in each process",
        RANDOM,
        ((_KEY, "    return (next(_COUNT) % 2**16).to_bytes(32)"),),
        "\nimport itertools\n\n_COUNT = itertools.count(int.from_bytes(b'k'))\n",
    ),
    Mutant(
        "sampling from numpy's generator, seeded by the model",
        BAGS,
        (
            (
                "    drawn = np.flatnonzero(source.bernoulli(rate, len(patients)))\n",
                "    drawn = np.flatnonzero(np.random.default_rng(len(patients)).random("
                "len(patients)) < rate)\n",
            ),
        ),
    ),
    Mutant(
        "a moving average over the steps of a round, without noise",
        STEP,
        (
            (
                _STD,
                _STD + "        self.average = 0.8 * getattr(self, 'average', 0.0) + 0.2 * "
                "total.double()\n",
            ),
            (_AFTER, "        update.add_((self.average * scale * 0.2).float())\n" + _AFTER),
        ),
    ),
    Mutant(
        "Adam's mean goes on from round to round, without noise",
        STEP,
        (
            (
                _STD,
                _STD + "        adam = 'betas' in self.original_optimizer.param_groups[0]\n"
                "        mean = _MEANS.setdefault(len(total), torch.zeros(len(total), "
                "dtype=torch.float64))\n"
                "        before = mean.clone() * adam\n"
                "        mean.mul_(0.9).add_(total, alpha=0.1)\n",
            ),
            (_AFTER, "        update.add_((before * scale).float())\n" + _AFTER),
        ),
        "\n_MEANS = {}\n",
    ),
    Mutant(
        "noise that is uniform, of the same variance",
        STEP,
        (
            (
                _NOISE,
                "piece.add_(torch.from_numpy(((self._random.words(len(piece)) / 2.0**64 - 0.5) "
                "* 12**0.5 * std).round().astype('int64')))",
            ),
        ),
    ),
    Mutant(
        "a running mean of the images, kept between patients",
        BAGS,
        (
            (
                "    return _aligned(stack).unsqueeze(1)\n",
                "    pixels = _aligned(stack).unsqueeze(1)\n"
                "    _SEEN[0] = 0.9 * _SEEN[0] + 0.1 * float(pixels.mean())\n"
                "    return pixels - _SEEN[0]\n",
            ),
        ),
        "\n_SEEN = [0.0]\n",
    ),
    Mutant(
        "released counts with noise for one count, not for a patient's",
        NOISED,
        (
            (
                "    std = mechanism.noise_multiplier * sensitivity(study)\n",
                "    std = mechanism.noise_multiplier * 16\n",
            ),
        ),
    ),
    Mutant(
        "released counts with one noise a process",
        NOISED,
        (
            (
                "    noise = random.normal(counts.size, std)",
                "    noise = _NOISES.setdefault(counts.size, random.normal(counts.size, std))"
                ".clone()",
            ),
        ),
        "\n_NOISES: dict = {}\n",
    ),
    Mutant(
        "a round that is not charged",
        APP,
        (
            (
                "            gate.charge(session, admission, round_number=task.round)\n"
                "            return Update",
                "            return Update",
            ),
        ),
    ),
    Mutant(
        "noise for the rounds, not for the steps",
        COST,
        (
            (
                "        training.total_steps,\n        beside",
                "        training.rounds,\n        beside",
            ),
        ),
    ),
)
"""Others of the same kinds, and of the claims around them."""


def planted(mutant: Mutant, folder: Path) -> list[Path]:
    """Copy the package into ``folder`` with the fault; return where it is imported from.

    Raises:
        ValueError: a text to patch is not there exactly once.
    """
    places = []
    for side in SIDES:
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / side, folder / side, ignore=skipped)
        places.append(folder / side)
    file = folder / mutant.file
    text = file.read_text("utf-8")
    for old, new in mutant.patches:
        if text.count(old) != 1:
            raise ValueError(f"{mutant.name}: {mutant.file} does not hold its text once: {old}")
        text = text.replace(old, new)
    file.write_text(text + mutant.more, encoding="utf-8")
    return places


def audit(places: list[Path], site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``cloister client privacy-audit`` of the package that is imported from ``places``."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = ["cloister_fl.cli.main", "client", "privacy-audit", "--json", "--dir", str(site)]
    return subprocess.run(
        [sys.executable, "-P", "-m", *command, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
