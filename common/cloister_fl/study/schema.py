"""Schema of the study: what a federation trains, on which data, under which privacy.

A study is configuration only. Its canonical form is JSON of the validated model with every
default filled in, keys sorted, no white space; its hash is SHA-256 over a label and that form.
Sites approve the hash, so two files that mean the same have the same hash, and no site can train
with another preprocessing than its neighbour.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cloister_fl.encoding.canonical_json import canonical_json
from cloister_fl.errors import StudyInvalid
from cloister_fl.networks.pretrained import PINNED
from cloister_fl.server_strategies import STRATEGIES
from cloister_fl.system.toml import KeyedValueError, ShownModel
from cloister_fl.tasks import LabelsFile, Target, Task, read_target

HASH_LABEL = b"cloister/study/v1\0"
UPDATE_LABEL = b"cloister/update/v1\0"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Modality = Literal["CR", "DX", "MG", "CT", "MR", "US"]
Pair = Annotated[tuple[float, float], Field(strict=False)]


UNSOUND_ENGINES = {
    "book-keeping": "one patient can move its sum of clipped gradients by many times "
    "privacy.clipping_norm, so no study's epsilon holds",
}
"""Engines that support no privacy claim, and why; see ``gradient_engines``."""

VOLUME_KEYS = ("dimensions", "depth", "spacing")
"""Keys of ``Input`` that say how slices become a volume."""

VOLUME_MODALITIES = frozenset(("CT", "MR"))

LATER: dict[tuple[str, str], object] = {
    ("evaluation", "stop_after"): 0,
    ("target", "unit"): "patient",
    ("training", "class_weights"): {},
}
"""Keys by table that came after studies were approved, with the default that means what a study
without them meant: left out, so that its hash is what it was."""

FEWEST_SLICES = 4
"""Fewest slices of a volume, of a series as of a tensor; localizers have one to three."""

MAX_VOXELS = 1 << 24
"""Most voxels of a volume: 256 x 256 x 256, 32 MB in a site's memory."""


class About(ShownModel):
    """What the study is called and what it asks."""

    name: Name
    question: Annotated[str, Field(min_length=1, max_length=2000)]


class Input(ShownModel):
    """Which images are read and how they become tensors; part of the hash."""

    modalities: Annotated[tuple[Modality, ...], Field(strict=False, min_length=1)] = ("CR", "DX")
    size: Annotated[int, Field(ge=16, le=1024)] = 128
    """Side of the square input, in pixels, after an area resize."""
    windowing: Literal["auto", "voi", "percentile", "fixed"] = "auto"
    """``auto``: the image's own VOI transform, else percentiles."""
    percentiles: Pair = (1.0, 99.0)
    window: Pair | None = None
    """Centre and width for ``fixed``, in the units after the modality LUT (HU for CT)."""
    dimensions: Literal[2, 3] = 2
    """2: each file is an image. 3: each series of CT or MR is a volume."""
    depth: Annotated[int | None, Field(ge=FEWEST_SLICES, le=256)] = None
    """Slices of a volume, after cropping or padding; for three dimensions only."""
    spacing: Annotated[float | None, Field(ge=0.1, le=100)] = None
    """Millimetres between the slices of a volume; for three dimensions only."""

    @model_validator(mode="after")
    def _window_fits(self) -> Input:
        if (self.windowing == "fixed") != (self.window is not None):
            raise KeyedValueError("window", "is needed for windowing = 'fixed', and only there.")
        if self.window is not None and self.window[1] <= 0:
            raise KeyedValueError("window", "has a width that is not above 0.")
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise KeyedValueError("percentiles", "must be two rising numbers from 0 to 100.")
        return self

    @model_validator(mode="after")
    def _volume_fits(self) -> Input:
        for key in ("depth", "spacing"):
            if (self.dimensions == 3) != (getattr(self, key) is not None):
                raise KeyedValueError(key, "is needed for dimensions = 3, and only there.")
        if self.depth is None:
            return self
        if not set(self.modalities) <= VOLUME_MODALITIES:
            raise KeyedValueError("modalities", "must be CT and MR alone for dimensions = 3.")
        if self.depth * self.size**2 > MAX_VOXELS:
            raise KeyedValueError(
                "depth", f"times size times size must be at most {MAX_VOXELS} voxels."
            )
        return self


class Network(ShownModel):
    """A network of the registry and its arguments."""

    name: Name = "small-cnn"
    arguments: dict[str, int | float | str | bool] = {}

    @model_validator(mode="after")
    def _pinned(self) -> Network:
        # Written out, so that the study's hash binds the weights as it binds all else.
        if self.name in PINNED:
            self.arguments.setdefault("weights", PINNED[self.name])
        return self


class Training(ShownModel):
    """Local training. Rate, steps and divisor are public constants, never a cohort's size."""

    rounds: Annotated[int, Field(ge=1, le=10_000)] = 20
    steps: Annotated[int | None, Field(ge=1, le=100_000)] = None
    """Local steps a round; or give ``epochs``. 1 where neither is given."""
    epochs: Annotated[float | None, Field(gt=0, le=1000)] = None
    """Expected passes over the patients a round: ``ceil(epochs / sampling_rate)`` steps."""
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability with which each patient joins a step (Poisson sampling)."""
    expected_batch: Annotated[float, Field(ge=1, le=1e7)] = 64
    """Divisor of the clipped sum, in patients: a round guess, public, the same at all sites."""
    images_per_patient: Annotated[int, Field(ge=1, le=64)] = 4
    """At most so many images of a sampled patient are drawn for a step."""
    class_weights: dict[
        Annotated[str, Field(min_length=1, max_length=128)],
        Annotated[float, Field(ge=0.001, le=1000)],
    ] = {}
    """Weight of each class, all of them named; none for equal ones. With privacy on, a patient's
    clipped gradient is multiplied by the weight over the largest; off, the loss of an image by the
    weight over the mean of all. Constants: never a cohort's counts."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 0.5
    schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate goes over the rounds; ``cosine``: down to nearly 0 (Loshchilov and
    Hutter 2017, without restarts)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    engine: Literal["patients", "opacus", "book-keeping"] = "patients"
    """``patients``: one gradient a patient; ``opacus``: through Opacus' own hooks, slower, to
    compare with; ``book-keeping`` was taken out, and is read in old studies alone
    (``gradient_engines``)."""
    augment: bool = False
    """Mirror and shift the images of a patient at random, inside the unit."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Initial weights, and sampling where privacy is off. Never the noise."""
    initial_model: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """Hash of the initial weights, which sites compare in round 1; empty until the study is bound
    (``initial_model``)."""

    @model_validator(mode="before")
    @classmethod
    def _one_step(cls, given: Any) -> Any:
        # Filled in here, so that a file that says the default has the hash of one that does not.
        if isinstance(given, dict) and given.get("steps") is None and given.get("epochs") is None:
            return {**given, "steps": 1}
        return given

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Training:
        if self.steps is not None and self.epochs is not None:
            raise KeyedValueError("epochs", "cannot be given together with 'steps'.")
        return self

    def rate_of(self, round_number: int) -> float:
        """Learning rate of a round, 1 to ``rounds``: a public function of the study alone."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (round_number - 1) / self.rounds)) / 2

    @property
    def steps_per_round(self) -> int:
        """Local steps a round, from ``steps`` or ``epochs``."""
        if self.epochs is not None:
            return max(1, math.ceil(self.epochs / self.sampling_rate - 1e-9))
        return self.steps or 1

    @property
    def total_steps(self) -> int:
        """T of the accountant: noised steps over the whole study."""
        return self.rounds * self.steps_per_round


class Privacy(ShownModel):
    """The promise a site makes to its patients: (epsilon, delta), add or remove one patient."""

    enabled: bool = True
    unit: Literal["patient"] = "patient"
    epsilon: Annotated[float, Field(gt=0, le=1000)] = 3.0
    delta: Annotated[float, Field(gt=0, lt=0.1)] = 1e-5
    clipping_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """C: L2 bound of one patient's gradient."""


class Aggregation(ShownModel):
    """How the server turns the sites' updates into the next model."""

    strategy: str = "fedavg"
    """A name of ``server_strategies.STRATEGIES``."""
    secure: bool = True
    """Whether updates leave a site by secure aggregation (``cloister_fl.secagg``)."""
    min_sites: Annotated[int, Field(ge=1, le=1000)] = 5
    """Fewest sites that a run begins with. With secure aggregation, the protocol derives from
    the invited sites how few may be left in a round; else a round needs as many, too."""
    colluders: Annotated[int, Field(ge=0, le=100)] = 1
    """Sites that may work with the coordinator without its learning another's update (c)."""
    clip: Annotated[float, Field(ge=1e-6, le=1000)] = 8.0
    """Bound of the absolute value of one coordinate of an update, with secure aggregation: the
    range of the fixed-point encoding, not the clipping norm. Larger is saturated with privacy
    on, an error at the site without it."""
    weights: dict[Name, Annotated[float, Field(ge=0.001, le=1000)]] = {}
    """Public weight of a site by name; 1 where it is not named. Never a cohort's size. A site with
    a weight far above the others' has the sum to itself: see ``weight_ratio``."""
    server_learning_rate: Annotated[float, Field(gt=0, le=1000)] = 1.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Adaptivity of FedAdam and FedYogi (Reddi et al. 2021)."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay, a round, of an exponential moving average of the global model. Above 0, the average
    is what is measured and released; it evens out noise and costs no privacy."""
    proximal_mu: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Pull towards the global model in FedProx (Li et al. 2020)."""

    @property
    def fewest_sites(self) -> int:
        """How few sites can train it: below c + 3, ``Parameters.derive`` of secagg refuses."""
        return max(self.min_sites, self.colluders + 3) if self.secure else self.min_sites

    @property
    def weight_ratio(self) -> float:
        """Largest public weight over the smallest, of the named sites and of any other."""
        weights = (1.0, *self.weights.values())
        return max(weights) / min(weights)

    def weight(self, site: str) -> float:
        """The public weight of a site."""
        return self.weights.get(site, 1.0)

    @field_validator("strategy")
    @classmethod
    def _listed(cls, strategy: str) -> str:
        if strategy not in STRATEGIES:
            raise ValueError(f"must be one of {', '.join(STRATEGIES)}.")
        return strategy

    @field_validator("weights")
    @classmethod
    def _comparable(cls, weights: dict[str, float]) -> dict[str, float]:
        # So that no weight can be encoded as 0, whatever the number of sites: see secagg.Session.
        if max((1.0, *weights.values())) > 1000 * min((1.0, *weights.values())):
            raise ValueError("must not differ by a factor above 1000; sites not named have 1.")
        return weights

    @model_validator(mode="after")
    def _proximal(self) -> Aggregation:
        if STRATEGIES[self.strategy].proximal != (self.proximal_mu > 0):
            pulled = " or ".join(f"'{row.name}'" for row in STRATEGIES.values() if row.proximal)
            raise KeyedValueError(
                "proximal_mu", f"must be above 0 for strategy = {pulled}, and only there."
            )
        return self


class Evaluation(ShownModel):
    """When the global model is measured, and on whom."""

    every: Annotated[int, Field(ge=1)] = 1
    """Rounds between two evaluations; the first and the last model are always evaluated."""
    site_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of a site's own patients kept for evaluation; used where privacy is off, and for the
    noised evaluation."""
    release_epsilon: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Part of ``privacy.epsilon`` that one noised evaluation by score histograms takes, after the
    last round; 0 for none. Training gets the noise that keeps both within the whole."""
    stop_after: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Ends a run after so many evaluations without a better headline figure on the hold-out's
    selecting part; 0 for never. The study's epsilon stays that of all its rounds, for what a run
    stops on is an output."""


class Study(ShownModel):
    """A validated study, from ``study.load`` or ``study.parse``.

    Its tables and their keys are attributes, such as ``training.rounds``; the file that
    ``cloister study new`` writes explains them. Keys are

    - of study: name, question;
    - of input: modalities, size, windowing, percentiles, window, dimensions, depth, spacing;
    - of target: kind, and those of its kind;
    - of network: name, arguments;
    - of training: rounds, steps, epochs, sampling_rate, expected_batch, images_per_patient,
      class_weights, optimizer, learning_rate, schedule, momentum, engine, augment, seed,
      initial_model;
    - of privacy: enabled, unit, epsilon, delta, clipping_norm;
    - of aggregation: strategy, secure, min_sites, colluders, clip, weights,
      server_learning_rate, beta1, beta2, tau, ema, proximal_mu;
    - of evaluation: every, site_fraction, release_epsilon, stop_after.
    """

    study: About
    input: Input = Input()
    target: Annotated[SerializeAsAny[Target], PlainValidator(read_target)]
    network: Network = Network()
    training: Training = Training()
    privacy: Privacy = Privacy()
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation = Evaluation()

    @field_validator("target")
    @classmethod
    def _dimensions_fit(cls, target: Target, info: ValidationInfo) -> Target:
        given = info.data.get("input")
        if given is not None and given.dimensions not in target.task.dimensions:
            raise KeyedValueError(
                "kind", f"cannot be '{target.kind}' for input.dimensions = {given.dimensions}."
            )
        if given is not None and given.dimensions == 3 and target.task.unit == "image":
            raise KeyedValueError("unit", "cannot be 'image' for input.dimensions = 3.")
        return target

    @field_validator("evaluation")
    @classmethod
    def _release_fits(cls, evaluation: Evaluation, info: ValidationInfo) -> Evaluation:
        privacy = info.data.get("privacy")
        if not evaluation.release_epsilon or privacy is None:
            return evaluation
        if not privacy.enabled:
            raise KeyedValueError("release_epsilon", "must be 0 where privacy is off.")
        if evaluation.release_epsilon >= privacy.epsilon:
            raise KeyedValueError(
                "release_epsilon",
                f"must be below privacy.epsilon, {privacy.epsilon:g}, which it is a part of.",
            )
        if not evaluation.site_fraction:
            raise KeyedValueError("release_epsilon", "needs a site_fraction above 0.")
        target = info.data.get("target")
        if target is not None and target.task.sensitivity is None:
            raise KeyedValueError(
                "release_epsilon",
                f"must be 0 for kind = '{target.kind}', which has no noised evaluation.",
            )
        return evaluation

    @field_validator("training")
    @classmethod
    def _weights_fit(cls, training: Training, info: ValidationInfo) -> Training:
        target = info.data.get("target")
        if not training.class_weights or target is None:
            return training
        task = target.task
        if not isinstance(task.source, LabelsFile):
            raise KeyedValueError(
                "class_weights", f"is for classes; kind = '{target.kind}' has none."
            )
        if set(training.class_weights) != set(task.strata):
            raise KeyedValueError(
                "class_weights", f"must name each class once: {', '.join(task.strata)}."
            )
        if max(training.class_weights.values()) > 1000 * min(training.class_weights.values()):
            raise KeyedValueError("class_weights", "must not differ by a factor above 1000.")
        return training

    @property
    def class_weights(self) -> tuple[float, ...]:
        """Of each class in the task's order, over the largest: above 0 and at most 1; empty where
        all are alike."""
        given = self.training.class_weights
        if len(set(given.values())) < 2:
            return ()
        return tuple(given[name] / max(given.values()) for name in self.task.strata)

    def canonical(self) -> str:
        """The canonical JSON that is hashed, approved and sent.

        Every key stands in it, but for those of ``LATER`` at their defaults.
        """
        held = self.model_dump(mode="json")
        for (table, key), default in LATER.items():
            # Targets of other kinds have other keys.
            if held[table].get(key) == default:
                del held[table][key]
        return canonical_json(held)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form under its label, 64 hexadecimal digits."""
        return hashlib.sha256(HASH_LABEL + self.canonical().encode()).hexdigest()

    @property
    def update_digest(self) -> bytes:
        """32 bytes over all that determines a site's update, for the rule on its reuse.

        With privacy on that is the study itself: each draws noise of its own and is charged for
        it. Without, what does not enter the training does not count, or two studies that differ
        in name alone would give two sums of the very same updates.
        """
        if self.privacy.enabled:
            return bytes.fromhex(self.digest)
        parts = {"input", "target", "network", "training"}
        held = {key: value for key, value in json.loads(self.canonical()).items() if key in parts}
        return hashlib.sha256(UPDATE_LABEL + canonical_json(held).encode()).digest()

    def bound_to(self, digest: str) -> Study:
        """The study with the hash of its initial model, 64 hexadecimal digits."""
        training = self.training.model_copy(update={"initial_model": digest})
        return self.model_copy(update={"training": training})

    @property
    def releases(self) -> bool:
        """Whether the study ends with a noised evaluation, which is charged."""
        return self.privacy.enabled and self.evaluation.release_epsilon > 0

    @property
    def unsound_engine(self) -> str:
        """Why the engine does not support the privacy claim, in one sentence; empty where it does,
        or the study makes none: without privacy nothing is clipped, and the engine has no effect.
        """
        engine = self.training.engine
        if not self.privacy.enabled or engine not in UNSOUND_ENGINES:
            return ""
        return f"training.engine is {engine!r} and privacy is on: {UNSOUND_ENGINES[engine]}."

    @property
    def task(self) -> Task:
        """What kind of labels there are, and all that follows from it."""
        return self.target.task


def study_from_canonical(text: str) -> Study:
    """Rebuild a study from its canonical JSON, as it arrives in a message.

    Raises:
        StudyInvalid: it is not the canonical form of a valid study.
    """
    try:
        study = Study.model_validate_json(text, strict=False)
    except ValueError:
        study = None
    if study is None or study.canonical() != text:
        raise StudyInvalid(
            "The study in the message is not in canonical form.",
            remedy="Install the same version of Cloister on both sides: cloister --version",
        )
    return study
