"""Checks of the peers' signed keys, encrypted shares and dealings."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from cloister_fl.errors import (
    BoxTampered,
    DealerBlamed,
    EpochReused,
    KeyReused,
    LowOrderKey,
    OverlapRefused,
    OwnRecordAltered,
    RosterMismatch,
    ShareMismatch,
    SignatureInvalid,
    TooFewSurvivors,
)
from cloister_fl.membership.roster import Roster
from cloister_fl.secagg import remedies
from cloister_fl.secagg.crypto import hashes, key_agreement, shamir
from cloister_fl.secagg.messages.codec import (
    Advertisement,
    Dealing,
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
        KeyReused: blames the later site of the pair.
    """
    seen: set[bytes] = set()
    for site in sorted(records):
        for key in (records[site].enc_pk, records[site].mask_pk):
            if key in seen:
                raise KeyReused(
                    f"{site} sent a key that is already in use.",
                    remedy=remedies.ASK_STEWARD,
                    blamed=site,
                )
            seen.add(key)


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


def open_parcels(
    request: MaskRequest,
    *,
    own: Dealing,
    records: Mapping[str, Advertisement],
    epoch_keys: bytes,
    roster: Roster,
    terms: EpochTerms,
    enc_sk: bytes,
) -> dict[str, tuple[bytes, bytes]]:
    """Check U2 and open the box of each dealer; (share of b, share of mask_sk) by dealer.

    Raises:
        OverlapRefused: U2 is not within U1 or lacks this site.
        TooFewSurvivors: U2 is smaller than m.
        OwnRecordAltered: the site's own dealing came back altered.
        SignatureInvalid, BoxTampered: something was altered on its way.
        DealerBlamed: what the dealer signed does not hold together.
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
    received = {}
    for parcel in request.parcels:
        dealer = parcel.dealing.dealer
        if dealer == site:
            if parcel.dealing != own or parcel.box:
                raise OwnRecordAltered(
                    "This site's own list of shares came back altered.",
                    remedy=remedies.SERVER_AT_FAULT,
                )
            continue
        check_dealing(parcel.dealing, tuple(records), epoch_keys, roster)
        received[dealer] = _open(parcel, site, records[dealer], epoch_keys, enc_sk)
    return received


def check_dealing(dealing: Dealing, u1: tuple[str, ...], epoch_keys: bytes, roster: Roster) -> None:
    """Check a dealing's signature and that it covers U1.

    Raises:
        SignatureInvalid: not signed by the trusted key over this epoch's keys.
        DealerBlamed: signed, but not for the sites of U1.
    """
    public = roster.keys.get(dealing.dealer)
    if public is None or not dealing.verified(public, epoch_keys):
        raise SignatureInvalid(
            f"The list of shares of {dealing.dealer} is not signed by its trusted key.",
            why="It was altered on its way, or its identity key changed.",
            remedy="Compare the fingerprint with the site's steward.",
        )
    if tuple(item.holder for item in dealing.dealt) != u1:
        raise DealerBlamed(
            f"The list of shares of {dealing.dealer} does not cover the sites that sent keys.",
            remedy=remedies.ASK_STEWARD,
            blamed=dealing.dealer,
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
) -> tuple[bytes, bytes]:
    dealer = parcel.dealing.dealer
    dealt = parcel.dealing.to(site)
    assert dealt is not None
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
        raise DealerBlamed(
            f"The encrypted share that {dealer} signed cannot be decrypted.",
            remedy=remedies.ASK_STEWARD,
            blamed=dealer,
        )
    b_share, key_share = content[: shamir.SHARE_BYTES], content[shamir.SHARE_BYTES :]
    if not (
        hmac.compare_digest(
            hashes.share_hash(epoch_keys, hashes.OF_B, dealer, site, b_share), dealt.b_hash
        )
        and hmac.compare_digest(
            hashes.share_hash(epoch_keys, hashes.OF_MASK_KEY, dealer, site, key_share),
            dealt.mask_key_hash,
        )
    ):
        raise DealerBlamed(
            f"A share from {dealer} is not the one that it signed.",
            remedy=remedies.ASK_STEWARD,
            blamed=dealer,
        )
    return b_share, key_share


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
