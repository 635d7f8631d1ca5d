"""The package's front door: public names come when they are asked for, and nothing heavy before."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import mach

HEAVY = ["joblib", "matplotlib", "numba", "numpy", "pyarrow", "rich", "scipy", "sklearn", "torch"]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", mach.__all__)
def test_every_public_name_is_the_thing_itself(name):
    if name != "__version__":
        assert getattr(mach, name) is getattr(importlib.import_module(mach._WHERE[name]), name)
        assert not isinstance(getattr(mach, name), ModuleType)


def test_the_names_are_those_that_are_promised():
    assert mach.__all__[0] == "__version__" and mach.__version__.count(".") == 2
    assert mach.__all__[1:] == [
        "Calibration", "Config", "ConfigError", "DataError", "Dataset", "LabelTable", "MachError", "Model", "ModelError", "TopK",
        "calibrate", "load", "load_calibration", "load_config", "precision_at_k", "prepare", "split_dev", "train",
        "write_dataset",
    ]  # fmt: skip
    assert dir(mach) == sorted(mach.__all__)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, mach, mach.cli, mach.config, mach.errors; dir(mach); mach.Config()"
    assert python(f"{code}; print(*sorted(set({HEAVY}) & set(sys.modules)))") == ""


@pytest.mark.parametrize(("name", "ours"), [("GOMP_SPINCOUNT", "10000"), ("THP_MEM_ALLOC_ENABLE", "1")])
@pytest.mark.parametrize("given", [None, "0"])
def test_what_torch_reads_as_it_loads_is_set_before_unless_the_user_has(monkeypatch, name, ours, given):
    if given is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, given)
    assert python(f"import os, sys, mach; print(os.environ['{name}'], 'torch' in sys.modules)") == f"{given or ours} False"


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the system has no huge pages")
def test_a_large_tensor_asks_for_huge_pages(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    code = """
        import re, mach, torch
        x = torch.empty(32 << 20, dtype=torch.uint8)
        for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read(), flags=re.MULTILINE)[1:]:
            first, end = (int(address, 16) for address in part.split()[0].split("-"))
            if first <= x.data_ptr() + (16 << 20) < end:
                print("hg" in re.search("VmFlags:(.*)", part)[1].split())
    """
    assert python(textwrap.dedent(code)) == "True"


@pytest.mark.parametrize("first", ["mach.parallel", "mach.train.loop", "mach.train"])
def test_train_is_the_function_whatever_was_imported_first(first):
    """The package `mach.train` bears the name of the function, and importing a package sets an attribute of its parent."""
    assert (
        python(f"import {first}, mach; from mach import train; print(mach.train.__name__, mach.train is train)") == "train True"
    )


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match=r"^module 'mach' has no attribute 'Modle'$"):
        mach.Modle  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Modle' from 'mach'"):
        from mach import Modle  # noqa: F401
