"""Names that the node, the executor and the service share."""

SUPEREXEC_SECRET = "superexec.secret"  # noqa: S105  # a file's name
"""In the site's folder of keys: what the executor shows to the node, and nobody else."""

FOREIGN = "foreign"
"""What the node calls the application of a run whose bundle is not the installed wheel's own."""
