"""From DICOM files to normalised arrays."""
