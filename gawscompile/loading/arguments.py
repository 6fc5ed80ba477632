"""Command lines that answer a bad value with one line on stderr and exit code 2, and what such a line holds."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gawscompile.ir.records import plain

LONGEST = 600
"""Characters of a message, which may come from anywhere."""


class Parser(argparse.ArgumentParser):
    """argparse's, without the usage in front of an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (--help says what there is)\n")


def one_line(error: BaseException | str) -> str:
    """What an error says, printable and on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= LONGEST else text[:LONGEST] + " …"
    return "".join(plain(text[i : i + 300]) for i in range(0, len(text), 300))


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argument's type: a whole number in a range."""

    def parsed(text: str) -> int:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown!r} is not a whole number") from None
        if number < least or (most is not None and number > most):
            wanted = f"{least} or more" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{shown} is out of range: {wanted}")
        return number

    return parsed


def path(text: str) -> Path:
    """An argument's type: a path, which is not empty (that would be the current folder)."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return Path(text)


def new_file(option: str, file: Path) -> None:
    """Whether a file can be written, before the work for it is done. Raises `ValueError`."""
    if file.is_dir():
        raise ValueError(f"{option} {file}: this is a folder; name a file")
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {file.parent}; make it first")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{option} {file}: not writable; name another file, or change its permissions")


def new_folder(option: str, folder: Path, empty: bool = False) -> None:
    """Whether a folder can be made, or is there and, where it must be, `empty`. Raises `ValueError`."""
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{option} {folder}: {above} is a file; name a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {folder}: {above} is not writable; name another folder, or change its permissions")
    if empty and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{option} {folder}: not an empty folder; name a new one")
