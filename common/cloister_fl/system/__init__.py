"""The operating system: files, locks, processes, clocks, what is installed."""
