"""Labels of a site: the file that a person keeps, and which of its rows speaks for which image."""
