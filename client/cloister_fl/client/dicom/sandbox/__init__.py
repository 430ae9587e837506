"""Worker processes that parse and decode hostile bytes, without keys, data or network."""
