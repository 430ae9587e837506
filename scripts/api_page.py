"""Write docs/api.md, the page of the public Python API, from docstrings alone; nothing is imported.

Public is what a module of ``MODULES`` states in its ``__all__``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
SIDES = ("common", "server", "client")

MODULES = (
    *("study", "simulation", "client.predict", "model_file", "metrics", "networks", "privacy"),
    *("tasks", "secagg", "errors"),
)
"""Public modules in the order of the page."""

STUDY = "cloister_fl.study.schema.Study"

HEAD = """\
# Python API

<!-- Written by scripts/api-page from the docstrings. Do not edit. -->

What is on this page is for programs and notebooks of your own; any other module may change with \
each version. The README has [ten lines that use it](../README.md#from-python). Installed without \
extras there are `cloister_fl.study` and `cloister_fl.errors`; a name that needs more raises \
`ExtraMissing` (CLO-601), whose remedy is the command that installs it. Nothing here changes the \
logging, the environment, the filters of warnings or the random numbers of the program that calls \
it. A `StrPath` is text or an `os.PathLike`, such as `pathlib.Path`.
"""

_SECTION = {
    "parameters": "Arguments",
    "attributes": "Attributes",
    "returns": "Returns",
    "yields": "Yields",
    "raises": "Raises",
}
_LITERAL = re.compile(r"::\n\n((?:    .*\n?|\n)+)")


def load() -> griffe.Module:
    """Read our sources."""
    logging.getLogger("griffe").addFilter(_refuse)
    loader = griffe.GriffeLoader(
        search_paths=[ROOT / side for side in SIDES], docstring_parser=griffe.Parser.google
    )
    package = loader.load("cloister_fl")
    loader.resolve_aliases()
    assert isinstance(package, griffe.Module)
    return package


def _refuse(record: logging.LogRecord) -> bool:
    """A docstring that griffe cannot read is an error: its text would be missing from the page."""
    if record.levelno >= logging.WARNING:
        raise ValueError(record.getMessage())
    return True


def public_modules(package: griffe.Module) -> Iterator[griffe.Module]:
    """The modules of the page, in its order."""
    for name in MODULES:
        module = package[name]
        assert isinstance(module, griffe.Module)
        yield module


def names_of(module: griffe.Module) -> list[str]:
    """What a module states to be public: functions and classes in order of their names."""
    return sorted((str(name) for name in module.exports or ()), key=str.lower)


def fields_of(found: griffe.Class) -> Iterator[griffe.Attribute]:
    """The fields that a class states, without those that its section of attributes explains."""
    told = _explained(found)
    methods = [one for one in found.functions.values() if isinstance(one, griffe.Function)]
    for name, member in found.attributes.items():
        if not isinstance(member, griffe.Attribute) or not member.annotation:
            continue
        line = member.lineno or 0
        assigned = any((one.lineno or 0) <= line <= (one.endlineno or 0) for one in methods)
        hidden = name.startswith("_") or name.isupper() or name in told
        if not (assigned or hidden or "property" in member.labels):
            yield member


def members_of(found: griffe.Class) -> Iterator[griffe.Function | griffe.Attribute]:
    """The public methods and properties of a class, in the order of the source."""
    for name, member in found.members.items():
        if name.startswith("_") or member.is_alias:
            continue
        if isinstance(member, griffe.Function) or "property" in member.labels:
            assert isinstance(member, griffe.Function | griffe.Attribute)
            yield member


def undocumented(package: griffe.Module) -> list[str]:
    """Public names without a docstring, and fields of public data classes that none explains."""
    found = []
    for module in public_modules(package):
        for name in names_of(module):
            each = _target(module, name)
            every = [each, *(members_of(each) if isinstance(each, griffe.Class) else ())]
            found += [one.path for one in every if one.docstring is None]
            # The tables of a study explain themselves: ``cloister study new``.
            if isinstance(each, griffe.Class) and each.path != STUDY:
                found += [one.path for one in fields_of(each) if one.docstring is None]
    return found


def render() -> str:
    """The whole page."""
    package = load()
    parts = [HEAD]
    modules = list(public_modules(package))
    parts.append(
        "\n".join(
            f"- [`{one.path}`](#{_anchor(one.path)}): {_text(_first_line(one))}" for one in modules
        )
    )
    for module in modules:
        parts.append(f"## `{module.path}`")
        parts.append(_docstring(module))
        for name in names_of(module):
            parts += _named(name, _target(module, name))
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _target(module: griffe.Module, name: str) -> griffe.Object:
    member = module.members[name]
    return member.final_target if isinstance(member, griffe.Alias) else member


def _named(name: str, found: griffe.Object) -> Iterator[str]:
    yield f"### `{name}`"
    if isinstance(found, griffe.Function):
        yield _code(_signature(name, found))
    elif isinstance(found, griffe.Class):
        yield _code(f"class {name}{_bases(found)}")
    elif isinstance(found, griffe.Attribute):
        yield _code(f"{name}: {found.annotation}" if found.annotation else name)
    yield _docstring(found)
    if isinstance(found, griffe.Class):
        for member in (*fields_of(found), *members_of(found)):
            if isinstance(member, griffe.Function):
                yield f"**`{name}.{_one_line(_signature(member.name, member))}`**"
            else:
                yield f"**`{name}.{member.name}`**: `{member.annotation}`"
            yield _docstring(member)


def _bases(found: griffe.Class) -> str:
    """The public exception or protocol that a class is; other bases are of no use to a reader."""
    names = [str(base) for base in found.bases] + [one.name for one in found.mro()]
    told = [name for name in names if re.fullmatch(r"[A-Z]\w*(Error|Exception|Protocol)", name)]
    return f"({told[0]})" if told else ""


def _signature(name: str, function: griffe.Function) -> str:
    """As in the source, without ``self``, a line for each parameter where one is too short."""
    given = [one for one in function.parameters if one.name not in ("self", "cls")]
    words = []
    starred = positional_only = False
    for one in given:
        if words and positional_only and one.kind is not griffe.ParameterKind.positional_only:
            words.append("/")
        positional_only = one.kind is griffe.ParameterKind.positional_only
        if one.kind is griffe.ParameterKind.keyword_only and not starred:
            words.append("*")
            starred = True
        star = {"variadic positional": "*", "variadic keyword": "**"}.get(str(one.kind.value), "")
        starred = starred or star == "*"
        word = f"{star}{one.name}"
        word += f": {one.annotation}" if one.annotation else ""
        default = one.default if not star else None
        word += f" = {default}" if default is not None and one.annotation else ""
        words.append(word)
    end = f" -> {function.returns}" if function.returns else ""
    line = f"{name}({', '.join(words)}){end}"
    if len(line) <= 90:
        return line
    return "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){end}"])


def _one_line(signature: str) -> str:
    return re.sub(r",\)", ")", re.sub(r"\(\s+", "(", re.sub(r"\s*\n\s*", " ", signature))).replace(
        ", )", ")"
    )


def _docstring(found: griffe.Object) -> str:
    if found.docstring is None:
        return ""
    parts = []
    for section in found.docstring.parsed:
        kind = section.kind.value
        if kind == "text":
            parts.append(_text(str(section.value)))
        elif kind in ("returns", "yields"):
            text = " ".join(_flat(one.description) for one in section.value)
            parts.append(f"{_SECTION[kind]}: {text}")
        elif kind in _SECTION:
            lines = [f"- {_item(kind, one)}: {_flat(one.description)}" for one in section.value]
            parts.append(f"{_SECTION[kind]}:\n\n" + "\n".join(lines))
        else:
            raise ValueError(f"{found.path}: a section of the kind {kind!r}")
    return "\n\n".join(parts)


def _item(kind: str, one: object) -> str:
    if kind != "raises":
        name = str(getattr(one, "name", ""))
        if name.endswith(","):
            raise ValueError(f"griffe reads one name a line, not '{name} ...'.")
        return f"`{name}`"
    # Several are a tuple to griffe.
    names = str(getattr(one, "annotation", "")).strip("()").split(",")
    return ", ".join(f"`{name.strip()}`" for name in names if name.strip())


def _explained(found: griffe.Class) -> set[str]:
    names: set[str] = set()
    for section in found.docstring.parsed if found.docstring else ():
        if section.kind.value == "attributes":
            names |= {one.name for one in section.value}
    return names


def _first_line(found: griffe.Object) -> str:
    assert found.docstring is not None, found.path
    return found.docstring.value.partition("\n")[0].rstrip(".")


def _text(text: str) -> str:
    """reStructuredText, as far as our docstrings use it, as Markdown."""
    pieces, end = [], 0
    for found in _LITERAL.finditer(text + "\n"):
        lines = [line.removeprefix("    ") for line in found[1].rstrip().splitlines()]
        language = "python" if any("import " in line for line in lines) else "text"
        before = text[end : found.start()]
        colon = ":" if before and not before[-1].isspace() else ""
        pieces += [_marked(before), colon, "\n\n", _code("\n".join(lines), language), "\n\n"]
        end = found.end()
    return "".join([*pieces, _marked(text[end:])]).strip()


def _marked(text: str) -> str:
    text = re.sub(r":(?:func|mod|class):`([^`]+)`", r"``\1``", text)
    return text.replace("``", "`")


def _flat(text: str) -> str:
    return _text(" ".join(text.split()))


def _code(text: str, language: str = "py") -> str:
    """A block of code; what is marked ``python`` is an example, which a test runs."""
    return f"```{language}\n{text}\n```"


def _anchor(path: str) -> str:
    return path.replace(".", "").lower()


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
