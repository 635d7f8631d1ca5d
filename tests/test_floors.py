"""The floors of mach/: a file imports from lower floors only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FLOORS = {
    "errors": 0, "comm": 1, "config": 1, "draw": 1, "files": 1, "gpu": 1, "kernels": 1, "hashing": 2, "data": 2, "encoders": 3,
    "heads": 3, "decoding": 3, "calibration": 4, "metrics": 4, "packed": 4, "reliability": 4, "model": 5, "store": 6, "train": 7,
    "parallel": 8, "estimators": 9, "compare": 9, "inspect": 9, "serve": 9, "cli": 10, "__main__": 11, "__init__": 12,
}  # fmt: skip


def upward_imports(package: Path) -> list[str]:
    """List every import inside package that is relative, or goes sideways or up a floor.

    Imports under TYPE_CHECKING and inside functions count too: a cycle put off is a cycle.
    A part of the package without a floor is listed, so that a new module must be given one.
    """
    bad = []
    for file in sorted(package.rglob("*.py")):
        where = file.relative_to(package)
        home = where.parts[0].removesuffix(".py")
        if home not in FLOORS:
            bad.append(f"{where}: no floor for '{home}'")
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level:
                bad.append(f"{where}:{node.lineno}: relative import")
                continue
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                root, _, rest = name.partition(".")
                target = rest.split(".")[0]
                if root == package.name and target != home and FLOORS.get(target, 99) >= FLOORS[home]:
                    bad.append(f"{where}:{node.lineno}: imports {name}")
    return bad


@pytest.mark.parametrize(
    ("file", "source", "is_bad"),
    [
        ("model.py", "from mach.heads.softmax import SoftmaxHead", False),
        ("decoding/aggregate.py", "from mach.decoding.topk import TopK", False),
        ("decoding/aggregate.py", "from mach.model import MachModel", True),  # up
        ("heads/softmax.py", "from mach import encoders", True),  # sideways
        ("train/loop.py", "def f():\n    import mach.cli", True),  # up, put off
        ("data/batch.py", "from . import shards", True),  # relative
        ("helpers.py", "", True),  # no floor
        ("cli.py", "import machinery", False),  # another package whose name begins alike
    ],
)
def test_the_check_itself(tmp_path, file, source, is_bad):
    path = tmp_path / "mach" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert bool(upward_imports(tmp_path / "mach")) == is_bad


def test_mach_imports_go_down():
    package = Path(__file__).resolve().parents[1] / "mach"
    if not package.is_dir():
        pytest.skip("no mach/ beside this file's folder")
    assert upward_imports(package) == []
