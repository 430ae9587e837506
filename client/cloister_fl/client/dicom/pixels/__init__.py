"""Pixels of a DICOM file: decoders with known answers, and preprocessing."""
