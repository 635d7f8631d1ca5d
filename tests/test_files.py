"""Files are whole or absent, and their checksums are frozen."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mach import files
from mach.errors import MachError, MissingExtra, nearest
from mach.files import atomic, checksum, clear_leftovers, free_bytes, read_json, write_json


def test_the_new_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic(path) as temporary:
        assert temporary.parent == tmp_path and temporary.name.startswith(".")
        temporary.write_text("new, and longer")
        assert path.read_text() == "old"
    assert path.read_text() == "new, and longer"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_disk_that_fails_to_sync_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def refuse(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"), atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with atomic(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert events == ["sync", "rename", "sync"]  # the file, its name, the folder


def test_private_temporary_files_become_readable(tmp_path):
    with atomic(tmp_path / "a") as temporary:
        temporary.touch(mode=0o600)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


values = st.dictionaries(st.text(), st.one_of(st.none(), st.integers(), st.floats(allow_nan=False), st.text(), st.booleans()))


@given(values)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("j") / "v.json"
    write_json(path, value)
    assert read_json(path) == value


def test_json_is_readable_by_people(tmp_path):
    write_json(tmp_path / "v.json", {"name": "北京", "n": [1]})
    assert (tmp_path / "v.json").read_text(encoding="utf-8") == '{\n "name": "北京",\n "n": [\n  1\n ]\n}\n'


def test_what_is_no_json_object_is_refused(tmp_path):
    path = tmp_path / "v.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"v\.json: holds list, not an object"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(json.JSONDecodeError):
        read_json(path)


def test_checksums_are_frozen(tmp_path):
    """A change here makes every stored manifest disagree with its files."""
    golden = {b"": "99aa06d3014798d86001c324468d497f", b"mach": "eb8163941bce7730399fd37b9d9c8f2e"}
    for content, digest in golden.items():
        (tmp_path / "f").write_bytes(content)
        assert checksum(tmp_path / "f") == digest


def test_a_checksum_does_not_depend_on_blocks(tmp_path):
    content = bytes(range(256)) * (3 << 14)  # 12 MiB: three blocks
    (tmp_path / "f").write_bytes(content + b"!")
    assert checksum(tmp_path / "f") == xxhash.xxh3_128_hexdigest(content + b"!")


def test_sync_folder_forgives_systems_that_cannot(tmp_path):
    files.sync_folder(tmp_path / "missing")


def test_errors_name_the_cure():
    assert str(MissingExtra("drawing", "demo")) == "drawing needs an optional package: pip install 'mach[demo]'"
    assert str(pickle.loads(pickle.dumps(MissingExtra("drawing", "demo")))) == str(MissingExtra("drawing", "demo"))
    assert issubclass(MissingExtra, MachError) and issubclass(MachError, ValueError)
    assert nearest("bukets", ["buckets", "hidden"]) == "; did you mean 'buckets'?"
    assert nearest("zzz", ["buckets"]) == ""


def test_leftovers_of_dead_processes_are_cleared_and_those_of_living_ones_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, living, other = (tmp_path / name for name in (f".a.json.{dead.pid}.tmp", f".b.json.{os.getpid()}.tmp", ".c.tmp"))
    for file in (left, living, other):
        file.write_text("")
    clear_leftovers(tmp_path, tmp_path / "absent")
    assert sorted(tmp_path.iterdir()) == sorted([living, other])


def test_the_room_that_is_left_is_what_the_system_says(tmp_path):
    before, found, after = os.statvfs(tmp_path), free_bytes(tmp_path), os.statvfs(tmp_path)
    low, high = sorted(state.f_bavail * state.f_frsize for state in (before, after))
    assert low - (64 << 20) <= found <= high + (64 << 20)  # others write, too
