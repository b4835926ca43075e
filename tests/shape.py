"""The little language in which fmz-vectors.json says what an answer looks like (fmz-protocol, part F)."""

from collections.abc import Callable
from typing import Any

MS = (10**12, 10**13)
S = (10**8, 10**11)

SCALARS: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "any": lambda value: True,
    "id": lambda value: isinstance(value, int | str) and not isinstance(value, bool),
    "int-ms": lambda value: isinstance(value, int) and MS[0] <= value < MS[1],
    "int-s": lambda value: isinstance(value, int) and S[0] <= value < S[1],
}


def mismatch(value: Any, schema: Any, where: str = "$") -> str:
    """Where and how the value differs from the schema; "" where it does not."""
    match schema:
        case str():
            if any(value == name[1:] if name.startswith("=") else SCALARS[name](value) for name in schema.split("|")):
                return ""
            return f"{where}: expected {schema}, got {value!r}"
        case [item]:
            if not isinstance(value, list):
                return f"{where}: expected a list, got {value!r}"
            return next((found for i, row in enumerate(value) if (found := mismatch(row, item, f"{where}[{i}]"))), "")
        case {"tuple": items}:
            if not isinstance(value, list) or len(value) != len(items):
                return f"{where}: expected {len(items)} columns, got {value!r}"
            return next((f for i, (v, s) in enumerate(zip(value, items, strict=True)) if (f := mismatch(v, s, f"{where}[{i}]"))), "")
        case {"oneof": schemas}:
            tried = [mismatch(value, one, where) for one in schemas]
            return "" if "" in tried else " or ".join(tried)
        case dict():
            if not isinstance(value, dict):
                return f"{where}: expected an object, got {value!r}"
            for key, one in schema.items():
                name = key.removesuffix("?")
                if name not in value:
                    if key == name:
                        return f"{where}.{name} is missing in {value!r}"
                elif found := mismatch(value[name], one, f"{where}.{name}"):
                    return found
            return ""
    raise ValueError(f"no such schema: {schema!r}")
