"""Damaged content, drawn by Hypothesis."""

import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, -1, 1, 255, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308)
VALUES = (None, True, "", "a", "..", "/", "\x00", "é" * 300, [], {}, [[]], {"": None}, *NUMBERS)


@st.composite
def mutated_bytes(draw, content: bytes, kinds: tuple[str, ...] = ("bit", "fill", "cut", "double", "insert", "end")) -> bytes:
    """Some bytes with bits turned, spans cut, doubled, overwritten or moved in, or the end cut off."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(result) - 1, 0)))
        length = draw(st.sampled_from((1, 1, 2, 4, 8, 32)))
        kind = draw(st.sampled_from(kinds))
        if kind == "bit" and result:
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "fill":
            result[at : at + length] = bytes([draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)))]) * len(result[at : at + length])
        elif kind == "cut":
            del result[at : at + length]
        elif kind == "double":
            result[at:at] = result[at : at + length]
        elif kind == "insert":
            result[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "end" and draw(st.booleans()):
            del result[at:]
    return bytes(result)


@st.composite
def mutated_json(draw, content: bytes) -> bytes:
    """A JSON document with a value or key replaced, left out or added, or its bytes mutated."""
    if draw(st.integers(0, 2)) == 0:
        return draw(mutated_bytes(content))
    document = json.loads(content)
    holder, value = {"": document}, document
    key: Any = ""
    while isinstance(value, dict | list) and value and draw(st.integers(0, 4)):
        holder, key = value, draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        value = holder[key]
    kind = draw(st.sampled_from(("value", "value", "value", "leave out", "key", "twice", "many")))
    if kind == "leave out" and holder is not document:
        del holder[key]
    elif kind == "key" and isinstance(holder, dict) and key:
        holder[draw(st.sampled_from(("", "format", "Format", key.upper())))] = holder.pop(key)
    elif kind == "many" and isinstance(holder, list):
        holder.extend([value] * 3)
    else:
        holder[key] = draw(st.sampled_from(VALUES))
    text = json.dumps(holder[""] if "" in holder and holder is not document and key == "" else document)
    return (text + text if kind == "twice" else text).encode()
