"""Figures of a model: AUROC, average precision, Dice, and their intervals."""
