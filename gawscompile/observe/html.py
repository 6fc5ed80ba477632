"""The page of a dump: one file, no network. Everything in it is data: the page's code puts it in as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent / "dump.html"


def page(data: Mapping[str, Any]) -> str:
    """The page that shows ``Dump.data()``."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    for character in "<>&":  # no text in the data can end the element that holds it
        text = text.replace(character, f"\\u{ord(character):04x}")
    before, mark, after = TEMPLATE.read_text(encoding="utf-8").partition("/*DATA*/")
    assert mark
    return before + text + after
