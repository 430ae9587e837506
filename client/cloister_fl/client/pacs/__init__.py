"""Archives that a site may fetch its images from: DICOMweb and C-GET."""
