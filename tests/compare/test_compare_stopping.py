"""A comparison that is asked to stop passes it on to the process that trains, and waits for its checkpoint."""

from __future__ import annotations

import os
import re
import signal

from mach.train.checkpoint import checkpoint_path
from mach.train.log import log_path


def test_a_comparison_passes_it_on(started, tiny, tmp_path):
    file = tmp_path / "c.toml"
    settings = "hidden = 8\nbuckets = 13\nbatch_size = 10\nrepetitions = 2\nepochs = 100000\n"
    file.write_text(f'[base]\n{settings}[[configurations]]\nname = "one"\n[[configurations]]\nname = "two"\n')
    process = started("compare", tiny.path, "--out", tmp_path / "out", "--config", file)
    process.await_steps(log_path(tmp_path / "out" / "one", [0, 1]))
    os.kill(process.process.pid, signal.SIGTERM)
    ended, line, err = process.end()
    where = r"one: stopped at step [\d,]+ of 2,000,000 \(repetitions 0-1\); go on with the same command"
    assert ended == 0 and re.fullmatch(rf"mach compare: .*{where}", line), err
    assert checkpoint_path(tmp_path / "out" / "one", [0, 1]).exists() and not list((tmp_path / "out").glob("**/.*"))
