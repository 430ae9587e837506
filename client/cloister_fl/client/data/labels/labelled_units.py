"""Units that have labels of their own: which one an image belongs to, and which rows speak for it.

A unit lies within one patient, always, and follows from the image's own header and the study: who
else is there has no say. The unit of privacy is the patient.
"""

from __future__ import annotations

from cloister_fl.client.dicom.folder_reader import Keys
from cloister_fl.client.site.label_settings import composed
from cloister_fl.tasks import Unit

UnitKey = tuple[str, ...]
"""What stands for a unit within a study."""

BREADTH = {"SOPInstanceUID": 0, "AccessionNumber": 1, "StudyInstanceUID": 1, "PatientID": 2}
"""How much a key column names: an image, an examination, a patient."""

BREADTH_OF_UNIT: dict[Unit, int] = {"image": 0, "examination": 1, "patient": 2}


def unit_of(unit: Unit, patient: str, keys: Keys) -> UnitKey:
    """The unit that an image belongs to.

    An examination is what has one Accession Number: a report is written for each. An image without
    one belongs to the examination of its Study Instance UID; one without either, to its own.

    Args:
        unit: ``Task.unit``.
        patient: the patient's pseudonym.
        keys: what the image's header says.
    """
    if unit == "patient":
        return (patient,)
    if unit == "examination":
        for kind, number in (("accession", keys.accession), ("study", keys.study_instance)):
            if composed(number):
                return (patient, kind, composed(number))
    return (patient, "image", keys.sop_instance)
