"""The one package of this side that touches what Flower does not promise to keep.

Pinned to flwr 1.41.0. ``node`` is Flower's SuperNode, embedded: it talks with the coordinator and
sees no data. ``executor`` takes the SuperNode's tasks over a UNIX socket in the site's folder and
runs the installed ClientApp in one warm process, and nothing else.
"""
