"""Names that the node, the executor and the service share."""

SUPEREXEC_SECRET = "superexec.secret"  # noqa: S105  # a file's name
"""In the site's folder of keys: what the executor shows to the node, and nobody else."""

RUN = "run"
"""Folder below the site's, of mode 0700: what is there only while the service runs."""

SOCKET = "node.socket"
"""In the folder ``RUN``: where the node answers the executor."""

LARGEST = 64 << 20
"""Bytes of the largest request and answer between node and executor; Flower sends a large object in
pieces of 5 MiB."""

FOREIGN = "foreign"
"""What the node calls the application of a run whose bundle is not the installed wheel's own."""
