"""What server and sites say to each other in a run, above Flower: messages and sessions."""
