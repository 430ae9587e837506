"""What is wrong with a value of a hand-written file, in words of the file and not of Python."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic_core import ErrorDetails

_TYPES: Mapping[str, str] = {
    "bool_type": "must be true or false.",
    "dict_type": "must be a table.",
    "finite_number": "must be a finite number.",
    "float_type": "must be a number.",
    "int_from_float": "must be a whole number.",
    "int_type": "must be a whole number.",
    "invalid_key": "is no key: a key is text.",
    "list_type": "must be a list.",
    "mapping_type": "must be a table.",
    "model_attributes_type": "must be a table.",
    "model_type": "must be a table.",
    "string_type": "must be text, in quotes.",
    "string_unicode": "must be text, in quotes.",
    "tuple_type": "must be a list.",
}
"""By pydantic's type of an error."""

_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("gt", "must be above {}."),
    "greater_than_equal": ("ge", "must be {} or more."),
    "less_than": ("lt", "must be below {}."),
    "less_than_equal": ("le", "must be at most {}."),
    "literal_error": ("expected", "must be {}."),
    "string_pattern_mismatch": ("pattern", "must match the pattern {}."),
    "string_too_long": ("max_length", "must have at most {} characters."),
    "string_too_short": ("min_length", "must have at least {} characters."),
    "too_long": ("max_length", "must have at most {} entries."),
    "too_short": ("min_length", "must have at least {} entries."),
}
"""Likewise, where a constant of the rule is told: its name, and the words around it."""


def in_our_words(detail: ErrorDetails) -> str:
    """Return a clause about a key, such as "must be 1 or more.", for an error of pydantic."""
    kind = detail["type"]
    if kind in _TYPES:
        return _TYPES[kind]
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = detail.get("ctx", {}).get(name)
        if bound is not None:
            text = words.format(f"{bound:g}" if isinstance(bound, float) else bound)
            return text.replace(" 1 characters.", " 1 character.").replace(
                " 1 entries.", " 1 entry."
            )
    return detail["msg"][:1].lower() + detail["msg"][1:] + "."
