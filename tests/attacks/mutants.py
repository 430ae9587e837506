"""Take one check out of the protocol at a time, and show that its attack then succeeds.

    python tests/attacks/mutants.py [WORD ...]

Each mutant is a copy of the package with one patch. The attack's test runs against the copy and
must fail; where it passes, the test is worth nothing, and this script ends with status 1. Words
choose the mutants whose name holds one of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "common"
SECAGG = "cloister_fl/secagg"


@dataclass(frozen=True)
class Mutant:
    """A check taken out of ``file`` and the test that must notice."""

    name: str
    file: str
    old: str
    new: str
    test: str
    more: tuple[tuple[str, str], ...] = ()
    """Further patches to the file, where the check has a second line of defence."""


def _mutant(name: str, file: str, old: str, new: str, test: str) -> Mutant:
    """A mutant of the protocol; the test is looked for in the files beside this one."""
    path = next(p for p in sorted(HERE.glob("test_*.py")) if f"def {test}(" in p.read_text("utf-8"))
    return Mutant(name, f"{SECAGG}/{file}", old, new, f"{path.name}::{test}")


def _local(name: str, file: str, old: str, new: str, test: str) -> Mutant:
    """A mutant of the sockets between our own processes, whose tests need no root."""
    where = f"cloister_fl/system/local_socket/{file}"
    return Mutant(name, where, old, new, f"test_local_account.py::{test}")


MUTANTS = (
    _mutant(
        "signatures of keys unchecked",
        "peer_checks.py",
        "if not record.verified(public):",
        "if False:",
        "test_key_substitution",
    ),
    _mutant(
        "signatures of keys taken from anyone",
        "peer_checks.py",
        "if not record.verified(public):",
        "if not any(record.verified(e.public_key) for e in roster.entries):",
        "test_key_substitution_signed_by_another_hospital",
    ),
    _mutant(
        "own record unchecked",
        "peer_checks.py",
        "if records.get(own.site) != own:",
        "if False:",
        "test_own_record_altered",
    ),
    _mutant(
        "low-order keys taken",
        "peer_checks.py",
        "if not (key_agreement.full_order(record.enc_pk) and "
        "key_agreement.full_order(record.mask_pk)):",
        "if False:",
        "test_low_order_key",
    ),
    _mutant(
        "non-canonical keys taken",
        "crypto/key_agreement.py",
        'int.from_bytes(public, "little") >= _FIELD',
        "False",
        "test_low_order_key",
    ),
    _mutant(
        "one key for two sites",
        "peer_checks.py",
        "if key in seen:",
        "if False:",
        "test_one_key_for_two_sites",
    ),
    _mutant(
        "roster not pinned",
        "participant.py",
        "if not hmac.compare_digest(terms.roster, self._roster.digest):",
        "if False:",
        "test_sybil_roster",
    ),
    _mutant(
        "invited sites past the roster",
        "participant.py",
        "if not set(terms.invited) <= set(self._roster.sites) or",
        "if",
        "test_sybils_invited_past_the_pinned_roster",
    ),
    _mutant(
        "threshold from the server",
        "participant.py",
        "if (request.threshold, request.survivors) != (derived.t, derived.m):",
        "if False:",
        "test_threshold_of_one",
    ),
    _mutant(
        "colluders from the server",
        "participant.py",
        "if terms.colluders != self._policy.colluders:",
        "if False:",
        "test_fewer_colluders_than_approved",
    ),
    Mutant(
        "a sum of two",
        f"{SECAGG}/parameters.py",
        "if n <= 2:",
        "if n < 0:",
        "test_hostile_server.py::test_a_sum_of_two",
        (("        m = max(t, c + 3)", "        m = t"),),
    ),
    _mutant(
        "small federations",
        "participant.py",
        "if derived.n < self._policy.minimum_sites:",
        "if False:",
        "test_a_small_federation_where_a_large_one_was_approved",
    ),
    _mutant(
        "studies not approved",
        "participant.py",
        "if not hmac.compare_digest(terms.study, self._policy.study):",
        "if False:",
        "test_another_study",
    ),
    _mutant(
        "no quorum at stage 4",
        "participant_epoch.py",
        "if valid < self.terms.parameters.t:",
        "if False:",
        "test_split_view_of_u3",
    ),
    _mutant(
        "a quorum of copies",
        "participant_epoch.py",
        "and verify(public, signature, hashes.CONSISTENT, *body)",
        "and any(verify(e.public_key, signature, hashes.CONSISTENT, *consent_body("
        "self.sid, e.site, self._u2, request.u3)) for e in self._roster.entries)",
        "test_one_signature_for_many",
    ),
    _mutant(
        "U3 not in the signed view",
        "messages/participant_messages.py",
        "return (sid, site.encode(), names(u2), names(u3))",
        "return (sid, site.encode(), names(u2))",
        "test_split_view_of_u3",
    ),
    Mutant(
        "stage 4 twice",
        f"{SECAGG}/participant_epoch.py",
        """        if "unmask" in self._replies:
            return self._stored("unmask", mark, Unmasked)
        with self._step(Stage.MASKED):""",
        "        with self._step(self.stage):",
        "test_hostile_server.py::test_active_and_dead_overlap",
        (
            ("            self._erase_secrets()\n", ""),
            ("        if committed not in (None, u3):", "        if False:"),
            (
                "if self._store.commit(self._session, u3) != u3:",
                "if False:",
            ),
        ),
    ),
    _mutant(
        "dropouts by the server's word",
        "participant_epoch.py",
        "dropped = tuple(site for site in self._u2 if site not in u3)",
        "dropped = self._u2",
        "test_dropped_sites_are_the_sites_own_conclusion",
    ),
    _mutant(
        "U3 past U2",
        "participant_epoch.py",
        "if not set(u3) <= set(self._u2) or self._site not in u3:",
        "if self._site not in u3:",
        "test_unknown_site_in_u3",
    ),
    _mutant(
        "U3 without the site",
        "participant_epoch.py",
        "if not set(u3) <= set(self._u2) or self._site not in u3:",
        "if not set(u3) <= set(self._u2):",
        "test_u3_without_the_site_itself",
    ),
    _mutant(
        "U3 of any size",
        "participant_epoch.py",
        "if len(u3) < self.terms.parameters.m:",
        "if False:",
        "test_u3_too_small",
    ),
    _mutant(
        "any number of other U3",
        "participant_epoch.py",
        "if any(other != self._u2 for other in self._consents):",
        "if False:",
        "test_a_second_other_u3",
    ),
    _mutant(
        "two sessions an epoch",
        "participant_epoch.py",
        """if not (same and fits):
                self._refuse_repeat()
            return""",
        """self._session = expected
            return""",
        "test_keys_sent_ahead_used_in_two_sessions",
    ),
    _mutant(
        "a second U2",
        "participant_epoch.py",
        """if not (same and fits):
                self._refuse_repeat()
            return""",
        """self._u2 = request.u2
            return""",
        "test_second_stage_two_with_another_u2",
    ),
    _mutant(
        "a second model",
        "participant_epoch.py",
        """if not (same and fits):
                self._refuse_repeat()
            return""",
        """self.sid = expected.sid(self._keys)
            return""",
        "test_second_stage_two_with_another_model",
    ),
    _mutant(
        "masking twice",
        "participant_epoch.py",
        """            return self._stored("mask", b"", Masked)""",
        """            self.stage = Stage.OPENED""",
        "test_a_second_update_under_the_same_mask",
    ),
    _mutant(
        "epochs unclaimed",
        "participant.py",
        "if not self._store.claim_epoch(terms.kid):",
        "if False:",
        "test_site_directory_restored_from_a_snapshot_in_mid_session",
    ),
    _mutant(
        "epoch ids twice",
        "participant.py",
        "if not self._store.claim_epoch(terms.kid):",
        "if False:",
        "test_an_epoch_id_a_second_time",
    ),
    _mutant(
        "retry with other boxes",
        "participant_epoch.py",
        "if committed is not None and not {self._site, *committed} <= set(u2):",
        "if False:",
        "test_retry_minus_one_site",
    ),
    _mutant(
        "retry with other survivors",
        "participant_epoch.py",
        "        if committed not in (None, u3):",
        "        if False:",
        "test_retry_with_all_boxes_minus_one_survivor",
    ),
    _mutant(
        "no durable word before stage 4",
        "participant_epoch.py",
        "if self._store.commit(self._session, u3) != u3:",
        "if False:",
        "test_two_sessions_at_once_answered_for_two_sets",
    ),
    _mutant(
        "attempts with other invited sites",
        "participant_epoch.py",
        "if not hmac.compare_digest(first, constants):",
        "if False:",
        "test_attempt_with_other_invited_sites",
    ),
    _mutant(
        "attempts with other weights",
        "session.py",
        """            f64(self.clip),
            self.weight_list,
        )

    def sid""",
        """            names(site for site, _ in self.weights),
        )

    def sid""",
        "test_attempt_with_other_weights",
    ),
    _mutant(
        "a repeated request with another session",
        "participant_epoch.py",
        "fits = expected == self._session and self.stage",
        "fits = self.stage",
        "test_repeated_request_against_another_model",
    ),
    _mutant(
        "a repeated request after the shares",
        "participant_epoch.py",
        " and self.stage in (Stage.OPENED, Stage.MASKED)",
        "",
        "test_repeated_request_after_the_shares",
    ),
    _mutant(
        "model not in the session",
        "session.py",
        "            self.model,\n            u64(self.dimension),",
        "            u64(self.dimension),",
        "test_another_model_to_one_site",
    ),
    _mutant(
        "session from the server",
        "participant_epoch.py",
        "if request.session != expected or self.terms.invited",
        "if self.terms.invited",
        "test_model_other_than_the_one_received",
    ),
    _mutant(
        "boxes unchecked",
        "peer_checks.py",
        "if not hmac.compare_digest(\n"
        "        hashes.box_hash(epoch_keys, dealer, site, parcel.box), dealt.box_hash\n"
        "    ):",
        "if False:",
        "test_altered_boxes",
    ),
    _mutant(
        "boxes in any order",
        "peer_checks.py",
        "if not hmac.compare_digest(\n"
        "        hashes.box_hash(epoch_keys, dealer, site, parcel.box), dealt.box_hash\n"
        "    ):",
        "if False:",
        "test_reordered_boxes",
    ),
    _mutant(
        "boxes for others",
        "peer_checks.py",
        "if not hmac.compare_digest(\n"
        "        hashes.box_hash(epoch_keys, dealer, site, parcel.box), dealt.box_hash\n"
        "    ):",
        "if False:",
        "test_box_for_another_site",
    ),
    _mutant(
        "U2 of any size",
        "peer_checks.py",
        "if len(u2) < terms.parameters.m:",
        "if False:",
        "test_dropped_boxes_below_the_least_size",
    ),
    _mutant(
        "U2 not in the signed view",
        "messages/participant_messages.py",
        "return (sid, site.encode(), names(u2), names(u3))",
        "return (sid, site.encode(), names(u3))",
        "test_boxes_withheld_from_one_site_unequal_u2",
    ),
    _mutant(
        "dealings of any epoch",
        "peer_checks.py",
        "if public is None or not row.verified(public, epoch_keys):",
        "if public is None:",
        "test_a_dealing_of_another_epoch",
    ),
    _mutant(
        "seeds folded to 32 bits",
        "crypto/keystream.py",
        "Cipher(algorithms.AES(key), modes.CTR(counter))",
        "Cipher(algorithms.AES(_fold(key)), modes.CTR(counter))",
        "test_seeds_of_few_bits",
    ),
    _mutant(
        "masks not bound to the session",
        "crypto/key_agreement.py",
        'frame(b"pair", names(sorted(pair)), sid, u2)',
        'frame(b"pair", names(sorted(pair)), u2)',
        "test_views_that_differ_do_not_cancel",
    ),
    _mutant(
        "masks not bound to U2",
        "crypto/key_agreement.py",
        'frame(b"pair", names(sorted(pair)), sid, u2)',
        'frame(b"pair", names(sorted(pair)), sid)',
        "test_views_that_differ_do_not_cancel",
    ),
    _mutant(
        "self masks not bound to U2",
        "crypto/key_agreement.py",
        'frame(b"self", sid, u2)',
        'frame(b"self", sid)',
        "test_views_that_differ_do_not_cancel",
    ),
    _mutant(
        "shares unchecked at stage 4",
        "peer_checks.py",
        "if not hmac.compare_digest(hashed, signed):",
        "if False:",
        "test_wrong_share_as_holder",
    ),
    _mutant(
        "shares of any sites at stage 4",
        "peer_checks.py",
        "if tuple(dealer for dealer, _ in given) != dealers:",
        "if False:",
        "test_shares_of_other_sites_as_holder",
    ),
    _mutant(
        "rebuilt b unchecked",
        "unmasking.py",
        "return hmac.compare_digest(hashes.commitment(",
        "return True or hmac.compare_digest(hashes.commitment(",
        "test_wrong_secret_as_dealer",
    ),
    _mutant(
        "rebuilt mask key unchecked",
        "unmasking.py",
        "return hmac.compare_digest(key_agreement.public_of(mask_sk), record.mask_pk)",
        "return True",
        "test_wrong_mask_key_as_dealer",
    ),
    _mutant(
        "shares past the field",
        "unmasking.py",
        "if len(secret) != shamir.SECRET_BYTES or not is_right(secret):",
        "if secret and not is_right(secret):",
        "test_shares_that_are_no_field_elements",
    ),
    _mutant(
        "boxes that do not open",
        "peer_checks.py",
        "if content is None:",
        "if content is None:\n        return bytes(33), bytes(33)\n    if content is None:",
        "test_the_accuser_goes_on_with_the_shares_that_the_dealer_publishes",
    ),
    _mutant(
        "boxes that were spoilt on their way are complained of",
        "peer_checks.py",
        """hashes.box_hash(epoch_keys, dealer, site, parcel.box), dealt.box_hash
    ):""",
        """hashes.box_hash(epoch_keys, dealer, site, parcel.box), dealt.box_hash
    ) and False:""",
        "test_a_box_that_the_server_spoilt_is_no_ground_for_a_complaint",
    ),
    _mutant(
        "shares other than signed",
        "peer_checks.py",
        "return shares if are_signed(shares, dealt, dealer, epoch_keys) else None",
        "return shares",
        "test_a_dealer_that_signed_other_shares_than_it_dealt_cannot_publish_them",
    ),
    _mutant(
        "disclosed shares unchecked by the accuser",
        "peer_checks.py",
        "if not are_signed(shares, parcel.row.dealt, dealer, epoch_keys):",
        "if False:",
        "test_disclosed_shares_that_the_server_altered",
    ),
    _mutant(
        "disclosed shares unchecked by the server",
        "peer_checks.py",
        "if dealt is None or not are_signed(shares, dealt, dealing.dealer, epoch_keys):",
        "if False:",
        "test_a_dealer_that_publishes_other_shares_than_it_signed_is_named",
    ),
    _mutant(
        "disclosures that anybody signed",
        "server.py",
        "if not answer.verified(public):",
        "if False:",
        "test_a_disclosure_forged_by_another_hospital",
    ),
    _mutant(
        "complaints that nobody signed",
        "peer_checks.py",
        "if public is None or not complaint.verified(public):",
        "if public is None:",
        "test_a_server_that_makes_up_complaints_gets_no_share",
    ),
    _mutant(
        "complaints of another epoch",
        "peer_checks.py",
        "or not hmac.compare_digest(complaint.keys, epoch_keys)",
        "or False",
        "test_a_server_that_makes_up_complaints_gets_no_share",
    ),
    _mutant(
        "complaints of everybody",
        "participant_epoch.py",
        "if len(self._accusers) > most:",
        "if False:",
        "test_more_complaints_than_sites_that_may_lie_get_no_share",
    ),
    _mutant(
        "no answer to the one accuser of a study without colluders",
        "parameters.py",
        "return max(self.c, 1)",
        "return self.c",
        "test_one_accusation_where_no_hospital_is_expected_to_collude",
    ),
    _mutant(
        "a complaint of what was published",
        "server.py",
        "if complaint.site in self._complaints.settled:",
        "if False:",
        "test_a_hospital_that_complains_of_shares_that_were_published_is_named",
    ),
    _mutant(
        "answers that are left out",
        "reply_dispatch.py",
        "if not fits:",
        "if False:",
        "test_a_hospital_that_leaves_its_part_out_is_named",
    ),
    _mutant(
        "a consent that is withheld",
        "server.py",
        "has_all = self._consents.keys() == set(self._u3)",
        "has_all = self._u3 == self._u2",
        "test_a_hospital_that_withholds_its_consent_is_asked_for_it_and_named",
    ),
    _mutant(
        "shares published after stage 4",
        "participant_epoch.py",
        "is_due = self.stage in (Stage.SHARED, Stage.OPENED, Stage.MASKED)",
        "is_due = True",
        "test_no_share_is_published_once_stage_four_was_answered",
    ),
    _mutant(
        "weights that leave one update in the sum",
        "participant.py",
        "if largest > smallest * self._policy.max_weight_ratio:",
        "if False:",
        "test_public_weights_that_leave_one_update_in_the_sum",
    ),
    _mutant(
        "rows for another site",
        "peer_checks.py",
        "if row.dealt.holder != site:",
        "if False:",
        "test_a_row_for_another_site",
    ),
    _mutant(
        "dealings for other sites",
        "peer_checks.py",
        "if tuple(item.holder for item in dealing.dealt) != u1:",
        "if False:",
        "test_dealing_for_other_sites_as_dealer",
    ),
    _mutant(
        "boxes other than signed at the server",
        "peer_checks.py",
        "if tuple(holder for holder, _ in shares.boxes) != peers or not all(",
        "if tuple(holder for holder, _ in shares.boxes) != peers or all([]) is None and not all(",
        "test_boxes_other_than_signed",
    ),
    _mutant(
        "stage-4 replies unsigned",
        "server.py",
        "if not reply.verified(public):",
        "if False:",
        "test_stage_four_reply_forged_by_another_hospital",
    ),
    _mutant(
        "vectors unsigned",
        "server.py",
        "if not masked.verified(public):",
        "if False:",
        "test_vector_forged_by_another_hospital",
    ),
    _mutant(
        "vector's hash not signed",
        "messages/participant_messages.py",
        "return (sid, site.encode(), u2_hash, vector_hash)",
        "return (sid, site.encode(), u2_hash)",
        "test_vector_forged_by_another_hospital",
    ),
    _mutant(
        "consents unsigned",
        "server.py",
        "if not verify(public, signature, hashes.CONSISTENT, *body):",
        "if False:",
        "test_consent_forged_by_another_hospital",
    ),
    _mutant(
        "records unsigned at the server",
        "peer_checks.py",
        "if not record.verified(public):",
        "if False:",
        "test_record_forged_by_another_hospital",
    ),
    _mutant(
        "two records of one site",
        "server.py",
        "    if held[site] != value:",
        "    if False:",
        "test_a_second_record",
    ),
    _mutant(
        "copied keys at the server",
        "server.py",
        "peer_checks.check_distinct({**self._records, record.site: record})",
        "pass",
        "test_another_sites_key_and_a_low_order_key",
    ),
    _mutant(
        "dropped sites come back",
        "server.py",
        "if site not in members or public is None:",
        "if public is None:",
        "test_a_dropped_site_comes_back_at_stage_four",
    ),
    _mutant(
        "every invited site needed",
        "server.py",
        "        if count < m:",
        "        if count < self.terms.parameters.n:",
        "test_dropout_before_the_vectors",
    ),
    _mutant(
        "a metric beside the vector",
        "participant_epoch.py",
        "self._consent_at_once(),",
        "self._consent_at_once() if float(update.std()) > 0.5 else b'',",
        "test_counts_and_metrics_in_clear",
    ),
    _mutant(
        "overflow that only warns",
        "fixed_point.py",
        "if not saturate:",
        "if False:",
        "test_overflow_that_only_warns",
    ),
    _mutant(
        "local faults told",
        "messages/abort_codes.py",
        "and not issubclass(kind.family, LOCAL_FAULTS)",
        "",
        "test_refusal_that_depends_on_data",
    ),
    _mutant(
        "refusal with noise on",
        "fixed_point.py",
        "if not saturate:",
        "if True:",
        "test_refusal_that_depends_on_data",
    ),
    _mutant(
        "eight bytes a parameter",
        "participant_epoch.py",
        'y.astype("<u4", copy=False).data',
        'y.astype("<u8", copy=False).data',
        "test_eight_bytes_a_parameter",
    ),
    _local(
        "a socket in a folder that others can use",
        "socket_file.py",
        "if about.st_mode & 0o077:",
        "if False:",
        "test_an_impostor_that_binds_first_in_a_folder_that_stands_open",
    ),
    _local(
        "whatever bears the socket's name",
        "socket_file.py",
        "if not stat.S_ISSOCK(about.st_mode) or about.st_uid != os.geteuid():",
        "if False:",
        "test_a_socket_path_planted_as_a_symlink_or_something_else",
    ),
    _local(
        "any user at the other end",
        "socket_file.py",
        "return bool(user == os.geteuid())",
        "return True",
        "test_the_kernels_word_on_who_is_there",
    ),
    _local(
        "the socket of a killed process stays",
        "socket_file.py",
        "os.rename(fresh, name, src_dir_fd=below, dst_dir_fd=below)",
        "os.link(fresh, name, src_dir_fd=below, dst_dir_fd=below)",
        "test_a_stale_socket_file_after_a_kill",
    ),
    _local(
        "a socket by its whole path",
        "socket_file.py",
        'bound.bind(f"/proc/self/fd/{below}/{fresh}")',
        "bound.bind(str(folder / fresh))",
        "test_an_over_long_path",
    ),
    _local(
        "requests of any size",
        "socket_server.py",
        "if len(held) > limit:",
        "if False:",
        "test_a_huge_local_body",
    ),
    _local(
        "requests announced of any size",
        "socket_server.py",
        "int(said[0]) > limit",
        "False",
        "test_a_huge_local_body",
    ),
    _local(
        "answers of any size",
        "socket_client.py",
        "if self._left < 0:",
        "if False:",
        "test_a_huge_local_answer",
    ),
    _local(
        "compressed answers",
        "socket_client.py",
        'if not small or "content-encoding" in answer.headers:',
        "if not small:",
        "test_a_huge_local_answer",
    ),
    Mutant(
        "one salt for all entries of the audit log",
        "cloister_fl/audit_log/log.py",
        "secrets.token_hex(SALT_BYTES)",
        '"0" * 64',
        "test_guessed_log.py::test_the_count_of_fetched_files_is_recovered_from_the_head",
    ),
    Mutant(
        "heads with their number",
        "cloister_fl/audit_log/log.py",
        'f"{self._name}:{head.hash}"',
        'f"{self._name}:{head.seq}:{head.hash}"',
        "test_guessed_log.py::test_the_number_of_local_decisions_is_read_off_the_heads",
    ),
    Mutant(
        "heads without the entry that was told before",
        "cloister_fl/audit_log/log.py",
        'f"{told}:{base}" if base else told',
        "told",
        "test_guessed_log.py::test_a_site_that_starts_again_goes_on_from_what_it_told",
    ),
)

_FOLD = """

def _fold(key: bytes) -> bytes:
    folded = 0
    for start in range(0, 32, 4):
        folded ^= int.from_bytes(key[start : start + 4], "little")
    return folded.to_bytes(4, "little") * 8
"""


@contextmanager
def mutated(mutant: Mutant) -> Iterator[Path]:
    """A copy of the package with the mutant's patch.

    Raises:
        ValueError: the text to patch is not there exactly once.
    """
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "common"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / mutant.file
        text = file.read_text()
        for old, new in ((mutant.old, mutant.new), *mutant.more):
            if text.count(old) != 1:
                raise ValueError(f"{mutant.name}: {mutant.file} does not hold its text once")
            text = text.replace(old, new)
        file.write_text(text + (_FOLD if "_fold(" in mutant.new else ""))
        yield copy


def verdict(mutant: Mutant) -> str:
    """``red`` where the attack's test fails on its assertions, else what went wrong."""
    with mutated(mutant) as copy:
        paths = [str(copy), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                f"tests/attacks/{mutant.test}",
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == 0:
        return "GREEN: the test does not notice"
    # Status 1 is a failed test; anything else is a test that did not run.
    broken = done.returncode != 1 or "SyntaxError" in done.stdout or "NameError" in done.stdout
    return f"BROKEN: {done.stdout[-600:]}" if broken else "red"


def main(words: list[str]) -> int:
    """Run the chosen mutants; 0 where every one is noticed."""
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    survivors = 0
    for mutant in chosen:
        answer = verdict(mutant)
        survivors += answer != "red"
        sys.stdout.write(f"{answer:>5}  {mutant.name}  [{mutant.test}]\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - survivors} of {len(chosen)} mutants noticed\n")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
