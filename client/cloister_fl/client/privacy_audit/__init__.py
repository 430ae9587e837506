"""Trying the privacy promise on the installed code. An audit is a lower bound: it refutes, it
never proves."""
