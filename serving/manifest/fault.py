"""What is wrong with a manifest's text, for who wrote it."""

from __future__ import annotations

import difflib
from typing import Any

from .part import Part, parts


def told(fault: Any, whole: type[Part]) -> str:
    """One of pydantic's faults. Of a key that is unknown, the nearest known one."""
    if fault["type"] != "extra_forbidden":
        return str(fault["msg"])
    where, key = fault["loc"][:-1], str(fault["loc"][-1])
    models = parts(whole.model_fields[str(where[0])].annotation) if where else [whole]
    known = list(dict.fromkeys(name for model in models for name in model.model_fields))
    near = difflib.get_close_matches(key, known, 1)
    return f"no such key; did you mean {near[0]!r}?" if near else f"no such key; there are {', '.join(known)}"
