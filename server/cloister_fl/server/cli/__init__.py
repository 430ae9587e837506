"""`cloister server`: what the coordinating site types."""
