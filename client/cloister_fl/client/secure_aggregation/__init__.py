"""A site's part in secure aggregation, between Flower's messages and `cloister_fl.secagg`."""
