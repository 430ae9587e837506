"""Admission control: what must be true before a site reads data for a study."""
