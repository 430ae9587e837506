"""Tasks: what a study predicts, how it is learnt, scored, counted and told.

Everything that depends on the kind of the labels stands in the module of that kind. No other file
asks whether there is a mask or a class.
"""

from __future__ import annotations

from cloister_fl.tasks.kinds import KINDS, read_target
from cloister_fl.tasks.task import LabelsFile, Segmentations, Target, Task, Unit

__all__ = ["KINDS", "LabelsFile", "Segmentations", "Target", "Task", "Unit", "read_target"]
