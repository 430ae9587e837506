"""Other packages: imported late, and without a change to the program that calls us."""
