"""The data set of a site: files, labels, masks, cohort, quarantine, what is frozen."""
