"""Audit of whole rounds, as a coordinator sees them: a made-up site answers messages, and what it
answers is held against the law that the study claims for it."""
