"""DICOM files: checks, header, pixels and segmentation masks, to normalised arrays."""
