"""Differential-privacy accounting: pure functions of public constants."""
