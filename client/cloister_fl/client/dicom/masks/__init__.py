"""Segmentation masks: DICOM Segmentations and their known answer."""
