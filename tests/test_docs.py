"""README and docs are run: their Python blocks, their shell lines, their links, and the output that they claim."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


@pytest.fixture
def as_in_the_repository(tmp_path):
    """A folder that looks like the repository's root, where `mach` is on the path."""
    (tmp_path / "mach").symlink_to(ROOT / "mach")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return tmp_path, os.environ | {"PATH": path, "COLUMNS": "120"}


def run(command, folder_and_environment):
    folder, environment = folder_and_environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_ten_lines_print_what_is_said(as_in_the_repository):
    (code,), (output,) = blocks(README, "python"), blocks(README, "text")
    assert run([sys.executable, "-c", code], as_in_the_repository) == output


def test_the_commands_run(as_in_the_repository):
    """The first block makes what the others need; these run two at a time."""

    def out_of(block):
        lines = block.splitlines()
        assert all(line.startswith("$ ") for line in lines)
        return run(["bash", "-euc", "\n".join(line[2:] for line in lines)], as_in_the_repository)

    first, *others = blocks(README, "console")
    assert len(others) > 5
    found = out_of(first)
    assert "London, GB" in found and "every file matches its checksum" in found
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(out_of, others))


def test_the_make_targets_exist():
    targets = re.findall(r"make ([a-z-]+)", "".join(page.read_text(encoding="utf-8") for page in PAGES))
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()]
    assert missing == []
