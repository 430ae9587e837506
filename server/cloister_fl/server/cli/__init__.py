"""`cloister server`: the commands of the coordinating site."""
