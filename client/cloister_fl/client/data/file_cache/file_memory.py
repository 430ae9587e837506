"""File memory of a site: cache, index and releases, opened together."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from cloister_fl.client.data.file_cache.file_index import Index
from cloister_fl.client.data.file_cache.image_cache import Cache
from cloister_fl.client.dicom.read_ahead import Memory
from cloister_fl.client.site.folder import Site


@contextmanager
def memory_of(site: Site, releases: Collection[bytes]) -> Iterator[Memory]:
    """Open a site's memory for one reading of its folder.

    Args:
        site: the opened site.
        releases: contents of held files that a person has released; see ``quarantine``.
    """
    key = site.cache_key()
    with Index(site.root / "index.sqlite", key) as index:
        yield Memory(Cache(site.cache, key), index, frozenset(releases))
