"""Packages import only packages that stand before them in the table of docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"


def layers() -> list[str]:
    """Bottom first, as the page's table lists them."""
    _, _, rest = PAGE.read_text().partition("\n## Layers\n")
    table, _, _ = rest.partition("\n## ")
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def imports(file: Path) -> Iterator[str]:
    """Our packages (or modules at the top) that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            head, *rest = name.split(".")
            if head == "gawscompile" and rest:
                yield rest[0]


DOORS = {"compile": "serving", "explain": "debug", "Report": "debug", "own_memory": "runtime"}
"""Names that the package itself has, and where they come from."""


def arrows() -> set[tuple[str, str]]:
    """(importer, imported), without those inside of a package."""
    package = ROOT / "gawscompile"
    found = set()
    for file in [*package.rglob("*.py"), *(package / "passes").glob("*.py")]:  # a link, which the first does not follow
        mine = file.relative_to(package).parts[0].removesuffix(".py")
        found |= {(mine, DOORS.get(other, other)) for other in imports(file)}
    return {(a, b) for a, b in found if a != b}


def test_every_package_has_its_layer():
    package = ROOT / "gawscompile"
    there = {path.name.removesuffix(".py") for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert there - {"__init__", "__pycache__"} == set(layers())


def test_no_import_goes_up():
    order = {name: number for number, name in enumerate(layers())}
    door = "__init__"  # what users import: names of any layer, on demand
    found = {(a, b) for a, b in arrows() if a != door}
    assert ("passes", "ir") in found
    up = sorted((a, b) for a, b in found if b in order and order[a] <= order[b])
    assert not up


def test_imports_are_seen(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("import torch\nfrom gawscompile import cache\ndef f():\n    import gawscompile.ir.spec\n")
    assert list(imports(file)) == ["cache", "ir"]
