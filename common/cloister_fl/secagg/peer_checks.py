"""Checks of the peers' signed keys, encrypted shares, dealings and complaints."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cloister_fl.errors import (
    BoxTampered,
    DealerBlamed,
    EpochReused,
    KeyReused,
    LowOrderKey,
    OverlapRefused,
    OwnRecordAltered,
    RosterMismatch,
    SessionMismatch,
    ShareMismatch,
    SignatureInvalid,
    TooFewSurvivors,
)
from cloister_fl.membership.roster import Roster
from cloister_fl.secagg import remedies
from cloister_fl.secagg.crypto import hashes, key_agreement, shamir
from cloister_fl.secagg.messages.codec import (
    Advertisement,
    Complaint,
    Dealing,
    DealtRow,
    DealtTo,
    Disclosure,
    MaskRequest,
    Parcel,
    ShareRequest,
    Shares,
    Unmasked,
)
from cloister_fl.secagg.session import EpochTerms


def check_record(record: Advertisement, terms: EpochTerms, roster: Roster) -> None:
    """Check one stage-0 record on its own: invited, of this epoch, signed, of full order.

    Raises:
        RosterMismatch, EpochReused, SignatureInvalid, LowOrderKey.
    """
    public = roster.public_key(record.site)
    if record.site not in terms.invited or public is None:
        raise RosterMismatch(
            "A key record is from a site that was not invited.",
            remedy=remedies.REPEAT,
        )
    if not hmac.compare_digest(record.kid, terms.kid):
        raise EpochReused(
            "A key record belongs to another key epoch.",
            remedy=remedies.REPEAT,
        )
    if not record.verified(public):
        raise SignatureInvalid(
            f"The keys of {record.site} are not signed by its trusted key.",
            why="They were replaced on their way, or its identity key changed.",
            remedy="Compare the fingerprint with the site's steward.",
        )
    if not (key_agreement.full_order(record.enc_pk) and key_agreement.full_order(record.mask_pk)):
        raise LowOrderKey(
            f"{record.site} sent a key of low order.",
            why="With it, anybody could compute the shared secret.",
            remedy=remedies.ASK_STEWARD,
            blamed=record.site,
        )


def check_distinct(records: Mapping[str, Advertisement]) -> None:
    """Refuse one key in two places: who holds one box or mask would hold the other.

    Raises:
        KeyReused: blames both sites.
    """
    seen: dict[bytes, str] = {}
    for site in sorted(records):
        for key in (records[site].enc_pk, records[site].mask_pk):
            if key in seen:
                both = sorted({seen[key], site})
                raise KeyReused(
                    f"{' and '.join(both)} sent one key in two places.",
                    why="No two keys are alike by chance: one site has the secret of the other.",
                    remedy=remedies.ASK_STEWARD,
                    blamed=", ".join(both),
                )
            seen[key] = site


def check_records(
    request: ShareRequest, own: Advertisement, terms: EpochTerms, roster: Roster
) -> None:
    """Check the records of U1 at a site.

    Raises:
        OwnRecordAltered: the site's own is missing or altered.
        TooFewSurvivors: U1 is smaller than m.
        RosterMismatch, EpochReused, SignatureInvalid, LowOrderKey, KeyReused: see above.
    """
    records = {record.site: record for record in request.records}
    if records.get(own.site) != own:
        raise OwnRecordAltered(
            "This site's keys came back altered or not at all.",
            remedy=remedies.SERVER_AT_FAULT,
        )
    for record in request.records:
        check_record(record, terms, roster)
    check_distinct(records)
    if len(records) < terms.parameters.m:
        raise TooFewSurvivors(
            f"{len(records)} sites sent keys; {terms.parameters.m} are needed.",
            remedy=remedies.MORE_SITES,
        )


@dataclass(frozen=True)
class Opened:
    """What a site found in its parcels.

    Attributes:
        shares: (share of b, share of mask_sk) by dealer, of those that are sound.
        unsound: dealers whose box is the one that they signed, and does not hold what they signed.
    """

    shares: dict[str, tuple[bytes, bytes]]
    unsound: tuple[str, ...]


def open_parcels(
    request: MaskRequest,
    *,
    own: DealtRow,
    records: Mapping[str, Advertisement],
    epoch_keys: bytes,
    roster: Roster,
    terms: EpochTerms,
    enc_sk: bytes,
) -> Opened:
    """Check U2 and open the box of each dealer, or take the shares that it has disclosed.

    Raises:
        OverlapRefused: U2 is not within U1 or lacks this site.
        TooFewSurvivors: U2 is smaller than m.
        OwnRecordAltered: the site's own row came back altered.
        SignatureInvalid, BoxTampered: something was altered on its way.
        DealerBlamed: a dealer's list does not cover the sites of U1.
    """
    u2, site = request.u2, own.dealer
    if not set(u2) <= records.keys() or site not in u2:
        raise OverlapRefused(
            "The sites that sent shares exclude this site, or include one that sent no keys.",
            remedy=remedies.REPEAT,
        )
    if len(u2) < terms.parameters.m:
        raise TooFewSurvivors(
            f"{len(u2)} sites sent shares; {terms.parameters.m} are needed.",
            remedy=remedies.MORE_SITES,
        )
    received: dict[str, tuple[bytes, bytes]] = {}
    unsound = []
    for parcel in request.parcels:
        dealer = parcel.row.dealer
        if dealer == site:
            if parcel.row != own or parcel.box:
                raise OwnRecordAltered(
                    "This site's own list of shares came back altered.",
                    remedy=remedies.SERVER_AT_FAULT,
                )
            continue
        check_row(parcel.row, site, tuple(records), epoch_keys, roster)
        shares = _open(parcel, site, records[dealer], epoch_keys, enc_sk)
        if shares is None and parcel.disclosed:
            shares = (
                parcel.disclosed[: shamir.SHARE_BYTES],
                parcel.disclosed[shamir.SHARE_BYTES :],
            )
            if not are_signed(shares, parcel.row.dealt, dealer, epoch_keys):
                raise BoxTampered(
                    f"The shares disclosed for {dealer} are not those that it signed.",
                    why="They were altered on their way, and no honest server passes them on.",
                    remedy=remedies.SERVER_AT_FAULT,
                )
        if shares is None:
            unsound.append(dealer)
        else:
            received[dealer] = shares
    return Opened(received, tuple(unsound))


def check_row(
    row: DealtRow, site: str, u1: tuple[str, ...], epoch_keys: bytes, roster: Roster
) -> None:
    """Check a row's signature and that it is for this site.

    Raises:
        SignatureInvalid: not signed by the trusted key over this epoch's keys.
        BoxTampered: it is for another site.
        DealerBlamed: signed, but not for the sites of U1.
    """
    public = roster.keys.get(row.dealer)
    if public is None or not row.verified(public, epoch_keys):
        raise _not_signed(row.dealer)
    if row.dealt.holder != site:
        raise BoxTampered(
            f"The encrypted share from {row.dealer} is for another site.",
            why="It was exchanged on its way.",
            remedy=remedies.SERVER_AT_FAULT,
        )
    if row.count != len(u1) or u1[row.index] != site:
        raise _does_not_cover(row.dealer)


def check_dealing(dealing: Dealing, u1: tuple[str, ...], epoch_keys: bytes, roster: Roster) -> None:
    """Check a dealing's signature and that it covers U1.

    Raises:
        SignatureInvalid: not signed by the trusted key over this epoch's keys.
        DealerBlamed: signed, but not for the sites of U1.
    """
    public = roster.keys.get(dealing.dealer)
    if public is None or not dealing.verified(public, epoch_keys):
        raise _not_signed(dealing.dealer)
    if tuple(item.holder for item in dealing.dealt) != u1:
        raise _does_not_cover(dealing.dealer)


def _not_signed(dealer: str) -> Exception:
    return SignatureInvalid(
        f"The list of shares of {dealer} is not signed by its trusted key.",
        why="It was altered on its way, or its identity key changed.",
        remedy="Compare the fingerprint with the site's steward.",
    )


def _does_not_cover(dealer: str) -> Exception:
    return DealerBlamed(
        f"The list of shares of {dealer} does not cover the sites that sent keys.",
        remedy=remedies.ASK_STEWARD,
        blamed=dealer,
    )


def check_boxes(shares: Shares, epoch_keys: bytes) -> None:
    """Check that the boxes are those of the dealing, one for each peer.

    Raises:
        BoxTampered: a box is missing, too much, or another than was signed.
    """
    dealer = shares.dealing.dealer
    peers = tuple(item.holder for item in shares.dealing.dealt if item.holder != dealer)
    if tuple(holder for holder, _ in shares.boxes) != peers or not all(
        hmac.compare_digest(
            hashes.box_hash(epoch_keys, dealer, item.holder, shares.box_for(item.holder)),
            item.box_hash,
        )
        for item in shares.dealing.dealt
    ):
        raise BoxTampered(
            f"The encrypted shares from {dealer} are not those that it signed.",
            why="They were altered, exchanged or dropped on their way.",
            remedy=remedies.SERVER_AT_FAULT,
        )


def _open(
    parcel: Parcel, site: str, record: Advertisement, epoch_keys: bytes, enc_sk: bytes
) -> tuple[bytes, bytes] | None:
    """The two shares in a box; None where the dealer sealed something else than it signed."""
    dealt, dealer = parcel.row.dealt, parcel.row.dealer
    if not hmac.compare_digest(
        hashes.box_hash(epoch_keys, dealer, site, parcel.box), dealt.box_hash
    ):
        raise BoxTampered(
            f"The encrypted share from {dealer} is not the one that it signed.",
            why="It was altered, exchanged or dropped on its way.",
            remedy=remedies.SERVER_AT_FAULT,
        )
    shared = key_agreement.agree(enc_sk, record.enc_pk)
    content = key_agreement.unseal(
        key_agreement.box_key(shared, epoch_keys, dealer, site),
        epoch_keys,
        dealer,
        site,
        parcel.box,
    )
    if content is None:
        return None
    shares = content[: shamir.SHARE_BYTES], content[shamir.SHARE_BYTES :]
    return shares if are_signed(shares, dealt, dealer, epoch_keys) else None


def are_signed(shares: tuple[bytes, bytes], dealt: DealtTo, dealer: str, epoch_keys: bytes) -> bool:
    """Whether both shares are those whose hashes the dealer signed for the holder of ``dealt``."""
    b_hash, key_hash = (
        hashes.share_hash(epoch_keys, hashes.OF_B, dealer, dealt.holder, shares[0]),
        hashes.share_hash(epoch_keys, hashes.OF_MASK_KEY, dealer, dealt.holder, shares[1]),
    )
    return hmac.compare_digest(b_hash, dealt.b_hash) and hmac.compare_digest(
        key_hash, dealt.mask_key_hash
    )


def check_complaint(
    complaint: Complaint, kid: bytes, epoch_keys: bytes, dealers: Collection[str], roster: Roster
) -> None:
    """Check that a site signed a complaint of this epoch, about others that deal in it.

    Raises:
        SignatureInvalid: it is not the site's.
        SessionMismatch: it is of another epoch, or about itself or about a stranger.
    """
    public = roster.public_key(complaint.site)
    if public is None or not complaint.verified(public):
        raise SignatureInvalid(f"The complaint of {complaint.site} is not signed by it.")
    named = set(complaint.dealers)
    if (
        not hmac.compare_digest(complaint.kid, kid)
        or not hmac.compare_digest(complaint.keys, epoch_keys)
        or not named
        or not named | {complaint.site} <= set(dealers)
        or complaint.site in named
    ):
        raise SessionMismatch(
            f"The complaint of {complaint.site} is of another key epoch.", remedy=remedies.REPEAT
        )


def check_disclosure(
    reply: Disclosure, accusers: tuple[str, ...], dealing: Dealing, epoch_keys: bytes
) -> None:
    """Check what a dealer published for its accusers against the hashes that it signed.

    Raises:
        DealerBlamed: something is missing, or is not what was signed.
    """
    given = dict(reply.shares)
    for accuser in accusers:
        dealt, both = dealing.to(accuser), given.get(accuser, b"")
        shares = both[: shamir.SHARE_BYTES], both[shamir.SHARE_BYTES :]
        if dealt is None or not are_signed(shares, dealt, dealing.dealer, epoch_keys):
            raise DealerBlamed(
                f"{dealing.dealer} cannot show the shares that it signed for {accuser}.",
                why="Its encrypted share did not open, and what it published is not what it "
                "signed.",
                remedy=remedies.ASK_STEWARD,
                blamed=dealing.dealer,
            )


def check_shares(
    reply: Unmasked, dealings: Mapping[str, Dealing], u2: tuple[str, ...], epoch_keys: bytes
) -> None:
    """Check the shares of a stage-4 reply against the hashes that their dealers signed.

    Raises:
        ShareMismatch: blames the holder, who has the signed share or would have refused it.
    """
    holder = reply.site
    dropped = tuple(site for site in u2 if site not in reply.u3)
    expected = (
        (hashes.OF_B, reply.b_shares, reply.u3),
        (hashes.OF_MASK_KEY, reply.mask_key_shares, dropped),
    )
    for kind, given, dealers in expected:
        if tuple(dealer for dealer, _ in given) != dealers:
            raise ShareMismatch(
                f"{holder} sent shares of other sites.",
                remedy=remedies.ASK_STEWARD,
                blamed=holder,
            )
        for dealer, share in given:
            dealt = dealings[dealer].to(holder)
            signed = b"" if dealt is None else dealt.b_hash
            if dealt is not None and kind == hashes.OF_MASK_KEY:
                signed = dealt.mask_key_hash
            hashed = hashes.share_hash(epoch_keys, kind, dealer, holder, share)
            if not hmac.compare_digest(hashed, signed):
                raise ShareMismatch(
                    f"{holder} sent another share than {dealer} dealt to it.",
                    remedy=remedies.ASK_STEWARD,
                    blamed=holder,
                )
