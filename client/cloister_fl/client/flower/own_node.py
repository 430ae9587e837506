"""The id of this site's node: written by the node, and read by the executor before it answers.

A site's signature says which node it answers as, so the id must not come from the message that
asks for the signature. The coordinator gives it to a node that comes online with the site's own key
and certificate; the node writes it to ``run/node.id`` in the site's folder.
"""

from __future__ import annotations

from cloister_fl.client.flower.names import RUN
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import FileUnreadable
from cloister_fl.system.files import read_secret, write_atomic

NODE_ID = "node.id"


def note_own_node(site: Site, node: int) -> None:
    """Write the id with which the node came online.

    Raises:
        OutputInTheWay: it cannot be written.
    """
    # Written anew whenever the node comes online.
    write_atomic(site.root / RUN / NODE_ID, str(node).encode(), durable=False)


def own_node(site: Site) -> int:
    """Return the id of the site's node, 1 to 2^64 - 1.

    Raises:
        FileUnreadable: the file is missing, no id, or others could have written it.
    """
    text = read_secret(site.root / RUN / NODE_ID)
    node = int(text) if text.isdigit() and len(text) <= 20 else 0
    if not 0 < node < 1 << 64:
        raise FileUnreadable(
            f"{NODE_ID} does not hold a node's id.",
            remedy=f"Start the service again: {site.command('stop')}, then {site.command('start')}",
        )
    return node
