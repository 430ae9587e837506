"""Template of a new ``site.toml``, with what a person should know beside each key."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister_fl.client.site.policy import Policy
    from cloister_fl.client.site.settings import Network


def site_text(name: str, dicom: str, labels: str, policy: Policy, network: Network) -> str:
    """Write a site file; who calls reads it back, and so sees whether the words fit."""

    def words(values: tuple[str, ...]) -> str:
        return "[" + ", ".join(_quote(value) for value in values) + "]"

    return f"""\
# This site: where its data lie and what it allows. Nothing in this file leaves the hospital,
# except the name. The policy binds every study; a study can ask for less, never for more.

[site]
name = {_quote(name)}

[data]
# Relative to this file's folder, or absolute.
dicom = {_quote(dicom)}
labels = {_quote(labels)}
# Images without a label, and rows of labels without an image, when data are frozen: "refuse", or
# "leave out", up to so many percent of both.
on_mismatch = "refuse"
left_out_at_most = 5.0
# Where the labels file has other names, words or an encoding of its own, delete its line and say
# below what they are; see docs/labels.md. By our word the file's column; by the file's word ours.
# [data.labels]
# file = {_quote(labels)}
# encoding = "cp1252"
# columns = {{ PatientID = "Patienten-ID", finding = "Befund" }}
# values.finding = {{ "Pneumonie" = "pneumonia", "o. B." = "normal" }}

[data.patients]
# What makes two patient numbers one patient's: "same", "different", or "ask", which stops checks
# and freezing where the data hold such a pair. See docs/patients.md, and what there is with:
# cloister client patients --dir FOLDER
# One number under several issuers; followed by ^ and more; with leading zeros; in capitals.
issuers = "ask"
components = "ask"
padding = "ask"
case = "ask"
punctuation = "ask"
# One name and birth date under several numbers; "different" where these are placeholders.
names = "ask"
# CSV file that says whose numbers are whose: columns PatientID, IssuerOfPatientID, person.
mapping = ""

[network]
# The hospital's outbound proxy, http://HOST:PORT; empty: HTTPS_PROXY is used, if set.
proxy = {_quote(network.proxy)}
# Where the proxy asks for a user; set the password with: cloister client proxy --dir FOLDER
proxy_user = {_quote(network.proxy_user)}

[policy]
# What one study, and all studies together, may cost a patient (epsilon). The first binds one
# study, by its hash: a coordinator can propose the same under another name. The second is what
# binds. A lifetime of 8 is four studies of epsilon 3 (they come to 7.9, three to 6.8), not more.
max_epsilon_study = {policy.max_epsilon_study!r}
max_epsilon_lifetime = {policy.max_epsilon_lifetime!r}
# Delta of the lifetime's account; at most 1 / (10 x the number of patients).
ledger_delta = {policy.ledger_delta!r}
# A public upper bound on this site's patients, not their number: round it up generously, such as
# 10000. A study's delta is at most 1 / (10 x this). 0: not declared, and no study with privacy is
# let in.
patients_at_most = {policy.patients_at_most}
# Least noise multiplier of a study's training and of its noised evaluation.
min_noise_multiplier = {policy.min_noise_multiplier!r}
# Fewest patients before this site trains; fewest of each class (0: any, also none); the same in a
# study without privacy, where exact counts leave.
min_patients = {policy.min_patients}
min_patients_per_class = {policy.min_patients_per_class}
min_patients_per_class_without_privacy = {policy.min_patients_per_class_without_privacy}
# true: updates leave only by secure aggregation; the coordinator reads nothing but their sum.
require_secure_aggregation = {_bool(policy.require_secure_aggregation)}
# Sites that may work with the coordinator without its learning this site's update.
colluders = {policy.colluders}
# Fewest sites that must take part.
min_sites = {policy.min_sites}
# Most that the largest public weight of a study (aggregation.weights) may be of the smallest. A
# site whose weight is far above the others' has the sum to itself. 1: all weights alike.
max_weight_ratio = {policy.max_weight_ratio!r}
max_rounds = {policy.max_rounds}
# true only where the data are public: what leaves then may reveal single patients.
allow_without_privacy = {_bool(policy.allow_without_privacy)}
# Empty lists allow all that Cloister supports.
networks = {words(policy.networks)}
modalities = {words(policy.modalities)}
# Metrics that may leave; empty allows none. "score-histograms": how many patients have which
# score; exact in a study without privacy, noised, charged and once in a study with it.
metrics = {words(policy.metrics)}
# Training window: when a round may begin, in local time, such as ["20:00-06:00"]; empty: any time.
hours = {words(policy.hours)}
# true: where the coordinator says that a run ended early, what it never started no longer counts
# in the lifetime, and the study is closed here. Of studies that are reserved from then on.
release_unstarted = {_bool(policy.release_unstarted)}
# What is approved without a person here: "none"; "listed", the studies of approved_hashes;
# "signed", those that a key of trusted_signers has signed (cloister study sign).
approve = {_quote(policy.approve)}
approved_hashes = {words(policy.approved_hashes)}
trusted_signers = {words(policy.trusted_signers)}
"""


def _quote(text: str) -> str:
    """Write a TOML basic string; JSON's escapes are a subset of TOML's, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _bool(value: bool) -> str:
    return "true" if value else "false"
