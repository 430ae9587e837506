"""A federation on one machine: simulation, demo, synthetic DICOM. Only it starts both sides."""
