"""PACS clients, DICOMweb and C-GET, and the encrypted store of fetched images."""
