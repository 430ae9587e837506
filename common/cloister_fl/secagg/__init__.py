"""Secure aggregation (``secagg/v2``): the server learns the sum of vectors and nothing else.

Pure protocol: no I/O, no network, no framework. The malicious-server variant of Bonawitz et al.,
*Practical Secure Aggregation for Privacy-Preserving Machine Learning* (CCS 2017), full graph,
with the session bound to the model (against the model-inconsistency attack of Pasquini et al.,
*Eluding Secure Aggregation*, CCS 2022) and to the set of sites whose masks are in it.

Call sequence of one epoch; each arrow is a message, ``encode`` gives its bytes::

    server = ServerEpoch(terms, roster)              site = Site(identity=..., store=..., ...)
    server.advertise_request()  -> AdvertiseRequest -> site.advertise(...) -> Advertisement
    server.receive_advertisement(...)
    server.share_request()      -> ShareRequest     -> site.share(...)     -> Shares
    server.receive_shares(...)
    server.start(session)
    server.mask_request(name)   -> MaskRequest      -> site.open(..., expected)
                                                       (train)
                                                       site.mask(kid, update) -> Masked
    server.receive_masked(...)
    server.close_vectors()      -> ConsistencyRequest, where a consent is missing: after a dropout
                                                    -> site.consent(...)   -> Consistent
    server.receive_consistent(...)
    server.unmask_request()     -> UnmaskRequest    -> site.unmask(...)    -> Unmasked
    server.receive_unmasked(...)
    server.finish()             -> Aggregate

**What the server learns** (sketch; the full proof is theorem 6.5 of the paper). Let at most c of
the n invited sites collude with the server, and let a site follow this code.

1. *Secrets come out one way.* A site's b and mask_sk leave it only in Shamir shares, sealed for
   one pinned holder each. An honest holder gives a share at stage 4 only, once an epoch, the
   share of b or of mask_sk of a dealer but never both: it derives U2 minus U3 itself.
2. *One U3 a session.* A site answers stage 4 for one U3. To rebuild b of v takes t sites that
   answer for a U3 with v in it, to rebuild mask_sk of v takes t that answer for one without; of
   either t - c at least are honest, and no honest site is in both, so 2(t - c) <= n - c. But
   t was chosen so that 2t > n + c. So of each v the server gets b or mask_sk, never both, and
   by the same count only one U3 is ever unmasked.
3. *One view.* The keys of all masks are derived from sid and U2. An honest site unmasks only
   with t consents over its own (sid, U2, U3); a site that was shown another model, other
   constants, other boxes or other survivors signs something else. By the count of 2, the honest
   sites that unmask share one view with every honest site whose mask is taken off.
4. *The rest is noise.* In that view each honest survivor's y carries pair masks with every other
   honest survivor, at least m - c of them, whose keys are X25519 agreements of keys that no one
   gave out. Their keystreams are pseudo-random, cancel in the sum over U3 and in no part of it,
   so the vectors of the honest survivors are independent of their updates but for their sum.
5. *Overlapping sums.* Two sums of one round over different U3 would differ by single hospitals.
   The U3 of a round is written durably before stage 4, and a site answers for no other in any
   later attempt or run; since attempts keep the invited sites and t, the count of 2 goes over
   all attempts together.

**Why nothing is lost by sending keys and boxes ahead.** After the first round a deployment needs
two round trips: the keys of epoch e + 1 ride with y of epoch e, its boxes with the stage-4 reply
of e. (i) Keys, commitment, shares and boxes of an epoch are functions of fresh randomness, of
kid and of T alone; none of these depends on the model, on an update, or on another epoch's
secrets. So moving stages 0 and 1 to an earlier time changes no distribution. (ii) The server
could always delay the model until after stage 1, so a server that picks the model knowing the
keys is the one that the proof already allows for. (iii) The model enters by sid, which enters
every mask key and every signature from stage 2 on. (iv) An epoch serves one sid: the site opens
one session an epoch, so keys sent ahead cannot be used for two models. (v) What waits is kept in
memory only; a restart drops it and the epoch with it. What changes is time alone: a secret that
is drawn earlier stays in memory for one more round.

The consent for U3 = U2 leaves with y for the same reason: it is what the site would sign next,
it is worth nothing without t - 1 others over the same view, and signing a second set after a
dropout changes nothing in 2, where answers count and not signatures.

**What is not promised.** A sum tells what a sum tells: differences between rounds, and the
update of a site whose peers all collude. The server may drop sites or stop the round, and a site
may send a poisoned update. The binding of session, U2 and U3 has had no external review yet.
"""

from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster, RosterEntry
from cloister_fl.secagg.crypto.hashes import model_hash
from cloister_fl.secagg.messages.codec import Bundle, Message, decode
from cloister_fl.secagg.parameters import VERSION, Parameters
from cloister_fl.secagg.participant import Site, SitePolicy
from cloister_fl.secagg.round_store import RoundStore
from cloister_fl.secagg.server import ServerEpoch
from cloister_fl.secagg.session import EpochTerms, Session
from cloister_fl.secagg.sum_record import SumRecord
from cloister_fl.secagg.transcript import Transcript, replay
from cloister_fl.secagg.unmasking import Aggregate

__all__ = [
    "VERSION",
    "Aggregate",
    "Bundle",
    "EpochTerms",
    "Identity",
    "Message",
    "Parameters",
    "Roster",
    "RosterEntry",
    "RoundStore",
    "ServerEpoch",
    "Session",
    "Site",
    "SitePolicy",
    "SumRecord",
    "Transcript",
    "decode",
    "model_hash",
    "replay",
]
