"""The command line: a run of each command, and one line on standard error with exit status 2 for whatever a user can mend."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mach import cli
from mach.cli.arguments import UNITS, count
from mach.config import Config
from mach.data import Dataset
from mach.store import Run, load_calibration, predictions
from mach.train import group

SMALL = ["--buckets", "13", "--hidden", "8", "--epochs", "1", "--batch-size", "50", "--rerank", "0", "--grouped", "0"]
PLACES = ["Lima", "Oslo", "Rome", "Kyiv", "Cairo", "Tokyo"]


@pytest.fixture
def mach(capsys):
    """Run a command in this process: `status, out, err = mach(...)`."""

    def run(*args):
        capsys.readouterr()
        try:
            status = cli.main([str(arg) for arg in args])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def works(mach):
    """Run a command that must succeed; give what it printed."""

    def run(*args):
        status, out, err = mach(*args)
        assert status == 0, err
        return out

    return run


@pytest.fixture
def fails(mach):
    """Run a command that must fail: status 2, nothing on standard output, one line on standard error, which matches."""

    def run(words, *args):
        status, out, err = mach(*args)
        assert (status, out, err.count("\n")) == (2, "", 1) and err.endswith("\n"), err
        assert re.fullmatch(rf"mach {args[0]}: .*{words}.*\n", err), err

    return run


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run folder of two repetitions: to read, not to change."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["train", str(tiny.path), "--out", str(path), *SMALL, "--repetitions", "2"]) == 0
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A data set of text and a run folder that knows it by heart."""
    folder = tmp_path_factory.mktemp("text")
    lines = [f"{name}{end}\t{name}\n" for name in PLACES for end in ("", " city", " town", " centre", " airport")]
    (folder / "train.tsv").write_text("".join(lines))
    assert cli.main(["prepare", str(folder / "train.tsv"), "--out", str(folder / "data")]) == 0
    settings = ["--buckets", "4", "--repetitions", "4", "--hidden", "16", "--epochs", "30", "--batch-size", "10"]
    assert cli.main(["train", str(folder / "data"), "--out", str(folder / "run"), *settings]) == 0
    return folder / "data", folder / "run"


@pytest.fixture(scope="module")
def predicted(run, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("predictions") / "p.parquet"
    assert cli.main(["predict", str(run), str(tiny.path), "--top-k", "12", "--out", str(path)]) == 0
    return path


def xc_folder(folder, *, n_test_features=5):
    folder.mkdir()
    rows = "".join(f"{i % 4} {i % 5}:1 {(i + 1) % 5}:0.5\n" for i in range(20))
    (folder / "train.txt").write_text(f"20 5 4\n{rows}")
    (folder / "test.txt").write_text(f"2 {n_test_features} 4\n0 0:1\n1,2 1:1\n")
    return folder


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def weights_of(path):
    run = Run.open(path)
    return {r: load_file(run.weights_path(r)) for r in run.finished()}


def agree(ours, theirs, atol=0.0):
    """Packed with others, a repetition's weights may round otherwise; in the same group they have the same bits."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[r][name], theirs[r][name]) for r in ours for name in theirs[r].keys() | ours[r].keys()]
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in pairs)


# The program


def test_help_is_light_and_quick():
    """Under 0.4 s of CPU (not of the clock), which importing any of these would break."""
    heavy = {"torch", "numpy", "numba", "scipy", "sklearn", "pyarrow", "matplotlib", "joblib", "rich", "safetensors"}
    code = (
        "import sys\nfrom mach.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as error:\n"
        f"    print(error.code, *sorted({heavy} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.4
    commands = "prepare split train rerank predict calibrate score decode evaluate ask compare inspect verify plan"
    assert re.findall(r"^    ([a-z]+)(?: |$)", done.stdout, flags=re.M) == commands.split()


def test_it_is_a_module_and_a_closed_pipe_is_no_trouble():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mach", "plan", "--labels", "3m"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + 13, "")


def test_each_command_explains_itself(mach):
    commands = "prepare split train rerank predict calibrate score decode evaluate ask compare inspect verify plan"
    for command in commands.split():
        status, out, _ = mach(command, "--help")
        assert status == 0 and out.startswith(f"usage: mach {command} ")
    _, out, _ = mach("train", "--help")
    assert "--repetitions R|a-b" in out and f"samples a step (default {Config().batch_size})" in " ".join(out.split())


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "mach: the following arguments are required: COMMAND; see mach --help"),
        (["fly"], "mach: argument COMMAND: invalid choice: 'fly' (choose from "),
        (["train", "d"], "mach train: the following arguments are required: --out; see mach train --help"),
        (
            ["train", "d", "--out", "r", "--loss", "logstic"],
            "mach train: argument --loss: invalid choice: 'logstic' (choose from ",
        ),
        (["train", "d", "--out", "r", "--bukets", "8"], "mach: unrecognized arguments: --bukets 8; see mach --help"),
        (["plan", "--labels", "many"], "mach plan: argument --labels: 'many' is not a count such as 3000000, 3m, 8G or 8GiB"),
    ],
)
def test_wrong_usage_is_one_line_too(mach, args, line):
    status, out, err = mach(*args)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(line)


def test_an_interrupt_is_told(mach, monkeypatch, run):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "load", interrupted)
    line = "\nmach ask: stopped; checkpoints and finished files are kept\n"
    assert mach("ask", run, "x") == (130, "", line)


@pytest.mark.parametrize("module", ["mach", "mach.cli"])
def test_both_modules_are_the_program(monkeypatch, capsys, module):
    monkeypatch.setattr(sys, "argv", [module, "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, f"mach {version('mach')}\n")


# prepare


def test_prepare_text(works, tmp_path):
    (tmp_path / "a.tsv").write_text("Londres\tLondon\nRom\tRome|Italy\nRoma\tRome\n")
    (tmp_path / "b.tsv").write_text("Rome\tRome\n")
    args = ["prepare", tmp_path / "a.tsv", "--test", tmp_path / "b.tsv", "--out", tmp_path / "data", "--max-features", "5"]
    line = f"{tmp_path}/data: train 3, test 1 samples, 5 features, 3 labels\n"
    line += "test: 1 of 1 samples (100%) have the very features of one in train; 0 of these share no label with it\n"
    assert works(*args) == line
    assert list(Dataset.open(tmp_path / "data").label_names) == ["London", "Rome", "Italy"]
    assert works(*args) == line  # a second time nothing is left to do


def test_prepare_a_folder(works, tmp_path):
    out = works("prepare", xc_folder(tmp_path / "xc"), "--out", tmp_path / "data", "--format", "xc")
    assert out == f"{tmp_path}/data: train 20, test 2 samples, 5 features, 4 labels\n"


def test_prepare_bad_input(fails, tmp_path):
    fails("nowhere: cannot be read", "prepare", tmp_path / "nowhere", "--out", tmp_path / "data")
    xc = xc_folder(tmp_path / "xc", n_test_features=6)
    fails(r"train.txt has 5 features.*test.txt.* 6", "prepare", xc, "--out", tmp_path / "data")
    (xc / "test.txt").write_text("2 5 4\n0 0:1\n9 1:1\n")
    fails(r"test.txt:3: label id 9 is outside \[0, 4\)", "prepare", xc, "--out", tmp_path / "data")
    (xc / "test.txt").write_text("1 5 4\n0 0:1\n")
    (tmp_path / "file").touch()
    fails("file/data: cannot be written", "prepare", xc, "--out", tmp_path / "file" / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "xc"]


def test_split_holds_samples_out_once(works, fails, tmp_path, tiny_without_dev):
    args = ["split", tiny_without_dev.path, "--out", tmp_path / "data", "--share", "0.2"]
    for _ in range(2):
        assert works(*args) == f"{tmp_path / 'data'}: train 160, test 60, dev 40 samples, 50 features, 40 labels\n"
    fails("holds another data set", *args, "--by", "alike")
    fails("has a dev split already, of 40 samples", "split", tmp_path / "data", "--out", tmp_path / "again")


# train


def test_train_says_what_it_made(works, tiny, tmp_path):
    out = works("train", tiny.path, "--out", tmp_path / "run", *SMALL, "--repetitions", "3")
    size, seconds = 3 * (50 * 8 + 8 + 13 * 8 + 13), r"\d+\.\d s of training"
    assert re.fullmatch(rf"{tmp_path}/run: 3 repetitions, {size:,} parameters, [\d,]+ bytes, {seconds}\n", out)


def test_train_the_full_head(works, tiny, tmp_path):
    out = works("train", tiny.path, "--out", tmp_path / "run", *SMALL[2:], "--table", "identity", "--loss", "softmax")
    assert f"{tmp_path}/run: 1 repetition, {50 * 8 + 8 + 40 * 8 + 40:,} parameters" in out
    assert Run.open(tmp_path / "run").load().table.identity


def test_repetitions_of_two_machines_decode_as_one(works, fails, tiny, run, tmp_path):
    parts = [tmp_path / "one", tmp_path / "two"]
    for path, numbers in zip(parts, ("0-1", "2-3"), strict=True):
        works("train", tiny.path, "--out", path, *SMALL, "--repetitions", numbers)
    assert [Run.open(part).manifest["repetitions"] for part in parts] == [2, 4]
    predict = ["predict", parts[0], tiny.path, "--top-k", "5", "--out"]
    works(*predict, tmp_path / "p2")
    for file in parts[1].glob("repetition-*"):
        shutil.copy(file, parts[0])
    works(*predict, tmp_path / "p4")
    works("train", tiny.path, "--out", tmp_path / "whole", *SMALL, "--repetitions", "4")
    works("predict", tmp_path / "whole", tiny.path, "--top-k", "5", "--out", tmp_path / "whole4")
    assert agree(weights_of(parts[0]), weights_of(tmp_path / "whole"), atol=1e-5)
    tables = [pq.read_table(tmp_path / name) for name in ("p2", "p4", "whole4")]
    scores = [np.array(table["scores"].to_pylist()) for table in tables]
    assert np.allclose(scores[1], scores[2], atol=1e-4) and not np.allclose(scores[0], scores[2], atol=1e-1)
    words = (
        "repetition 0 is missing; repetition 1 is missing; train again with --repetitions 0-1, or leave out with --skip-broken"
    )
    fails(words, "predict", parts[1], tiny.path, "--out", tmp_path / "p")
    works("predict", parts[1], tiny.path, "--out", tmp_path / "p", "--skip-broken")
    works("predict", parts[0], tiny.path, "--out", tmp_path / "q", "--repetitions", "2-3")
    assert pq.read_table(tmp_path / "p")["labels"].equals(pq.read_table(tmp_path / "q")["labels"])


def test_a_lost_repetition_is_trained_alone(works, fails, tiny, run, tmp_path):
    path = shutil.copytree(run, tmp_path / "run")
    lost = weights_of(path)
    Run.open(path).weights_path(1).unlink()
    assert "\nrepetition 1 is missing its weights\n" in works("inspect", path)
    works("train", tiny.path, "--out", path, *SMALL, "--repetitions", "1-1")
    assert agree(weights_of(path), lost, atol=1e-5)
    works("train", tiny.path, "--out", tmp_path / "alone", *SMALL, "--repetitions", "3-3")
    assert Run.open(tmp_path / "alone").finished() == [3]


def test_train_on_a_folder_of_xc_files_prepares_it_once(works, tmp_path, monkeypatch):
    xc = xc_folder(tmp_path / "xc")
    monkeypatch.chdir(tmp_path)
    for out in ("runs/a", "runs/a", "."):
        works("train", xc, "--out", out, *SMALL[2:], "--buckets", "2", "--repetitions", "1")
    assert Dataset.open("runs/a.data").n_labels == 4
    made = [p.stat().st_mtime_ns for p in Path("runs/a.data").rglob("*")]
    works("train", xc, "--out", "runs/a", *SMALL[2:], "--buckets", "2", "--repetitions", "2")
    assert [p.stat().st_mtime_ns for p in Path("runs/a.data").rglob("*")] == made
    assert Path(f"{tmp_path}.data").exists()
    shutil.rmtree(f"{tmp_path}.data")


def test_flags_go_before_the_file(works, tiny, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('buckets = 13\nhidden = 9\nepochs = 1\nrepetitions = 2\nnormalize = true\nloss = "softmax"\n')
    works("train", tiny.path, "--out", tmp_path / "run", "--config", file, "--hidden", "8", "--no-normalize", "--seed", "5")
    config = Run.open(tmp_path / "run").config
    assert (config.buckets, config.hidden, config.repetitions, config.seed) == (13, 8, 2, 5)
    assert (config.loss, config.normalize, config.dropout) == ("softmax", False, "auto")
    works("train", tiny.path, "--out", tmp_path / "auto", "--config", file, "--repetitions", "auto")
    assert Run.open(tmp_path / "auto").finished() == list(range(8))


def test_a_stopped_run_goes_on_to_the_same_bits(works, fails, mach, tiny, run, tmp_path, monkeypatch):
    train = ["train", tiny.path, "--out", tmp_path / "run", *SMALL, "--repetitions", "2", "--checkpoint-seconds", "0"]

    def stopped(*_):
        raise KeyboardInterrupt

    def write(*args, write=group.write_checkpoint):
        written.append(args)
        write(*args)

    written = []
    with monkeypatch.context() as patch:
        patch.setattr(group, "_finish", stopped)
        patch.setattr(group, "write_checkpoint", write)
        status, out, err = mach(*train)
    assert (status, out) == (130, "") and err.endswith("\nmach train: stopped; checkpoints and finished files are kept\n")
    assert len(written) >= 3  # after each of the four steps, the last perhaps not
    fails("run: repetitions 0-1 are under way here; add --resume to go on", *train)
    works(*train, "--resume")
    assert agree(weights_of(tmp_path / "run"), weights_of(run))


def test_train_bad_input(fails, tiny, run, text, tmp_path):
    def train_fails(words, *args, data=tiny.path, out=tmp_path / "new"):
        fails(words, "train", data, "--out", out, *SMALL, *args)

    train_fails("nowhere: is not a data set", data=tmp_path / "nowhere")
    train_fails(r"buckets=41 must lie in \[2, 40\], the number of labels of this data set", "--buckets", "41")
    train_fails("hidden='wide' must be", "--hidden", "wide")
    train_fails(r"dropout=2 must lie in \[0, 0.99\]", "--dropout", "2")
    train_fails("device='gpu' must be 'auto', 'cpu' or 'cuda:i'", "--device", "gpu", out=tmp_path / "other")
    train_fails("device='cuda:99': this machine has", "--device", "cuda:99", out=tmp_path / "other")
    train_fails("repetitions='x' must be a count such as 8, a range such as 0-7", "--repetitions", "x")
    train_fails(r"repetitions=\[0, 1\]: the full head .* has one repetition", "--table", "identity", "--repetitions", "2")
    train_fails("absent.toml: cannot be read", "--config", tmp_path / "absent.toml")
    (tmp_path / "c.toml").write_text("bukets = 8\n")
    train_fails(r"c.toml: unknown key 'bukets'; did you mean 'buckets'\? \(known: table, ", "--config", tmp_path / "c.toml")
    train_fails("was made with other settings: seed=0 there, 1 now; choose another --out", "--seed", "1", out=run)
    train_fails("was trained on another data set", "--buckets", "4", "--resume", data=text[0], out=run)
    (tmp_path / "file").touch()
    train_fails(r"cannot be written \(Not a directory\); choose another --out", out=tmp_path / "file" / "run")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_while_training(mach, tiny, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mach.store.folder.save_file", full)
    status, out, err = mach("train", tiny.path, "--out", tmp_path / "run", *SMALL, "--repetitions", "1")
    assert (status, out) == (2, "")  # and before the line, the bars as they were
    assert re.search(r"\nmach train: .*repetition-000.safetensors: cannot be written \(.*No space left on device\).*\n$", err)


# predict, evaluate, ask


def test_predict_writes_what_the_model_says(works, run, tiny, tmp_path):
    out = works("predict", run, tiny.path, "--split", "dev", "--top-k", "3", "--estimator", "min", "--out", tmp_path / "p")
    assert out == f"{tmp_path}/p: 40 rows\n"
    top = Run.open(run).load().predict_topk(tiny.split("dev").features, 3, estimator="min")
    table = pq.read_table(tmp_path / "p")
    assert table["labels"].to_pylist() == top.labels.tolist() and table["scores"].to_pylist() == top.scores.tolist()
    assert predictions.read_facts(tmp_path / "p")["run"] == Run.open(run).manifest["key"]
    works("predict", run, tiny.path, "--out", tmp_path / "p")
    assert len(pq.read_table(tmp_path / "p")["labels"][0]) == 40  # 100 by default, or all


def test_predict_bad_input(fails, run, tiny, text, tmp_path):
    def predict_fails(words, *args, model=run, data=tiny.path, out=tmp_path / "p"):
        fails(words, "predict", model, data, "--out", out, *args)

    predict_fails("nowhere: is not a run folder", model=tmp_path / "nowhere")
    predict_fails("nowhere: is not a data set", data=tmp_path / "nowhere")
    predict_fails("is a data set, not a run folder", model=tiny.path)
    predict_fails("the model was trained on 50 and 40", "--split", "train", data=text[0])
    predict_fails("has no split 'valid'; there are: train, test, dev", "--split", "valid")
    predict_fails(r"k=41 must lie in \[1, 40\], the number of labels", "--top-k", "41")
    predict_fails("repetitions='x' must be a count", "--repetitions", "x")
    predict_fails("repetition 7 is missing", "--repetitions", "0,7")
    predict_fails("device='cpu:0' must be", "--device", "cpu:0")
    predict_fails("is a folder; give the name of the file", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_predict_with_workers_among_some_labels(works, fails, run, tiny, tmp_path):
    (tmp_path / "some").write_text("3\n5\n7\n11\n")
    (tmp_path / "bought").write_text("3,5\n" + "\n" * 59)
    choice = ["--restrict", tmp_path / "some", "--exclude", tmp_path / "bought", "--top-k", "2"]
    for workers in (1, 2):
        out = works("predict", run, tiny.path, "--out", tmp_path / f"p{workers}", *choice, "--workers", workers)
        assert out == f"{tmp_path}/p{workers}: 60 rows\n"
    assert (tmp_path / "p1").read_bytes() == (tmp_path / "p2").read_bytes()
    labels = pq.read_table(tmp_path / "p1")["labels"].to_pylist()
    assert sorted(labels[0]) == [7, 11] and {label for row in labels for label in row} <= {3, 5, 7, 11}
    predict = ["predict", run, tiny.path, "--out", tmp_path / "q"]
    fails("bought:1: leaves 38 labels to find k=40 among", *predict, "--exclude", tmp_path / "bought")
    fails("some: has 4 lines for 60 samples; give one each", *predict, "--exclude", tmp_path / "some")
    fails("bought:1: '3,5' is no label id", *predict, "--restrict", tmp_path / "bought")
    fails("workers=0 must be at least 1", *predict, "--workers", "0")
    assert not list(tmp_path.glob("q*"))


def test_a_stopped_prediction_says_how_to_go_on(mach, works, run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "GROUP_ROWS", 25)
    real = predictions.Parts.write
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C

    def write(self, part, *args):
        real(self, part, *args)
        os.kill(os.getpid(), signal.SIGINT)

    predict = ["predict", run, tiny.path, "--out", tmp_path / "p"]
    with monkeypatch.context() as patch:
        patch.setattr(predictions.Parts, "write", write)
        line = f"\nmach predict: {tmp_path}/p: stopped after 25 of 60 rows; go on with the same command\n"
        assert mach(*predict) == (130, "", line)
    signal.signal(signal.SIGINT, before)
    works(*predict)


def test_score_and_decode(works, fails, run, tiny, tmp_path):
    works("predict", run, tiny.path, "--top-k", "3", "--out", tmp_path / "p", "--estimator", "mean")
    for i in range(2):
        for r, options in ((0, []), (1, ["--device", "cpu"])):
            score = ["score", run, tiny.path, "--repetition", r, "--shard", f"{i}/2", "--out", tmp_path / f"s{r}", *options]
            assert works(*score) == f"{tmp_path}/s{r}: repetition {r}, shard {i}/2, 30 rows, {30 * 13 * 4 + 128:,} bytes\n"
    decode = ["decode", tmp_path / "s0", tmp_path / "s1", "--top-k", "3"]
    assert works(*decode, "--out", tmp_path / "d", "--estimator", "mean") == f"{tmp_path}/d: 60 rows\n"
    assert pq.read_table(tmp_path / "d").equals(pq.read_table(tmp_path / "p"))
    assert works("evaluate", tmp_path / "d", tiny.path).splitlines()[1:] == works(
        "evaluate", tmp_path / "p", tiny.path).splitlines()[1:]  # fmt: skip
    fails("s0: lacks repetition 1, shards 0, 1 of 2", "decode", tmp_path / "s0", "--out", tmp_path / "e")
    fails("shard='2/2' must be i/n", "score", run, tiny.path, "--repetition", 0, "--shard", "2/2", "--out", tmp_path / "s0")
    fails("repetition 7 is missing", "score", run, tiny.path, "--repetition", 7, "--out", tmp_path / "s0")
    for r in range(2):
        works("score", run, tiny.path, "--repetition", r, "--top-buckets", "5", "--out", tmp_path / "t")
    decode = ["decode", tmp_path / "t", "--top-k", "3", "--out"]
    words = r"d5: 60 rows, \d+ of them not certified; --redo RUN DATA computes those in full\n"
    assert re.fullmatch(f"{tmp_path}/{words}", works(*decode, tmp_path / "d5"))
    assert works(*decode, tmp_path / "r5", "--redo", run, tiny.path) == f"{tmp_path}/r5: 60 rows\n"
    (tmp_path / "some").write_text("3\n5\n7\n")
    works(*decode, tmp_path / "c5", "--redo", run, tiny.path, "--repetitions", "0-0", "--restrict", tmp_path / "some")
    assert sorted(pq.read_table(tmp_path / "c5")["labels"][0].as_py()) == [3, 5, 7]


def test_evaluate_prints_percentages_in_the_order_people_read_them(works, predicted, tiny):
    lines = works("evaluate", predicted, tiny.path).splitlines()
    assert lines[0] == f"{predicted}: 60 samples, in percent"
    found = dict(line.split() for line in lines[1:])
    assert list(found) == ("P@1 P@3 P@5 nDCG@1 nDCG@3 nDCG@5 R@10 MAP PSP@1 PSP@3 PSP@5 PSnDCG@1 PSnDCG@3 PSnDCG@5".split())
    assert len({line.index(".") for line in lines[1:]}) == 1  # one under the other
    as_json = json.loads(works("evaluate", predicted, tiny.path, "--json"))
    assert found == {name: f"{100 * value:.2f}" for name, value in as_json.items()}


def test_evaluate_options(works, predicted, tiny):
    found = json.loads(works("evaluate", predicted, tiny.path, "--json", "--threshold", "0"))
    assert 0 <= found["macro-F1"] <= 1 and 0 <= found["micro-F1"] <= 1
    assert " micro-F1 " in works("evaluate", predicted, tiny.path, "--threshold", "0")
    amazon = json.loads(works("evaluate", predicted, tiny.path, "--json", "--propensity", "amazon"))
    assert amazon["P@1"] == found["P@1"] and amazon["PSP@1"] != found["PSP@1"]


def test_calibrate_then_predict_and_evaluate(works, mach, fails, run, tiny, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    p = tmp_path / "p.parquet"
    fails("run: is not calibrated .*; make one with `mach calibrate`", "predict", run, tiny.path, "--probabilities", "--out", p)
    fails("plot='a.gif' must end with one of .png, .svg, .pdf", "calibrate", run, tiny.path, "--plot", "a.gif")
    out = works("calibrate", run, tiny.path, "--precision", "0.2", "1", "--top-k", "9", "--plot", tmp_path / "a.svg")
    assert out.startswith("40 samples of dev, the 9 best labels of each") and (tmp_path / "a.svg").exists()
    assert "expected calibration error, ECE@9" in out and out.endswith(f"kept: {run / 'calibration.json'}\n")
    found = json.loads(works("calibrate", run, tiny.path, "--precision", "0.2", "1", "--top-k", "9", "--json"))
    assert found["of"]["k"] == 9 and [each["wanted"] for each in found["thresholds"]] == [0.2, 1.0]
    works("verify", run)
    works("predict", run, tiny.path, "--probabilities", "--top-k", "9", "--out", p)
    assert pq.read_schema(p).names == ["row", "labels", "scores", "probabilities"]
    lines = works("evaluate", p, tiny.path).splitlines()[1:]
    assert [line.split()[0] for line in lines][-4:] == ["ECE@1", "ECE@5", "Brier@1", "Brier@5"]
    works("predict", run, tiny.path, "--precision", "0.2", "--top-k", "9", "--out", p)
    measured = json.loads(works("evaluate", p, tiny.path, "--json"))
    assert list(measured)[-3:] == ["precision", "recall", "coverage"] and 0 < measured["recall"] < 1
    fails("precision=0.8 has no threshold", "predict", run, tiny.path, "--precision", "0.8", "--out", p)
    fails(r"min_probability=2 must lie in \(0, 1\]", "predict", run, tiny.path, "--min-probability", "2", "--out", p)
    fails(
        "was fitted on other scores .*estimator logits there, mean now",
        "predict", run, tiny.path, "--probabilities", "--estimator", "mean", "--out", p,
    )  # fmt: skip
    (tmp_path / "some").write_text("1\n2\n3\n")
    (tmp_path / "none").write_text("\n" * tiny.split("test").n_samples)
    for choice in (["--restrict", tmp_path / "some"], ["--exclude", tmp_path / "none"]):
        for trust in (["--probabilities"], ["--precision", "0.2"], ["--min-probability", "0.1"], []):
            status, _, err = mach("predict", run, tiny.path, *choice, *trust, "--top-k", "3", "--out", p)
            warned = (
                "mach predict: the calibration was fitted where all labels may be found; with --restrict or --exclude its pro"
            )
            assert (status, err.startswith(warned), err.count("\n")) == (0, bool(trust), len(trust[:1]))
    fails("trained on its split 'train'", "calibrate", run, tiny.path, "--split", "train")
    flip_a_byte(run / "calibration.json")
    fails("calibration.json: is broken", "verify", run)


def test_evaluate_bad_input(fails, predicted, tiny, text, run, tmp_path):
    fails("absent: there is no such file; make it with `mach predict`", "evaluate", tmp_path / "absent", tiny.path)
    fails("is not a prediction file of `mach predict`", "evaluate", run / "manifest.json", tiny.path)
    fails("is not a prediction file of `mach predict`", "evaluate", tiny.path, tiny.path)
    fails("p.parquet: is of data [0-9a-f]{16}, not of [0-9a-f]{16}", "evaluate", predicted, text[0], "--split", "train")
    fails("p.parquet: is of split test, not of dev; predict this split first", "evaluate", predicted, tiny.path, "--split", "dev")
    fails(r"did you mean 'amazon'\?", "evaluate", predicted, tiny.path, "--propensity", "amazn")
    fails("nowhere: is not a data set", "evaluate", predicted, tmp_path / "nowhere")


@pytest.mark.parametrize("estimator", ["logits", "log-probs", "mean", "min", "median"])
def test_ask_draws_bars(works, text, estimator):
    lines = works("ask", text[1], "Oslo centre", "Kyiv", "--top-k", "3", "--estimator", estimator).splitlines()
    assert [lines[0], lines[4], len(lines)] == ["Oslo centre", "Kyiv", 8]
    shares = []
    for line in (*lines[1:4], *lines[5:]):
        bar, share, name = re.fullmatch(r"  (.{20}) ([01]\.\d\d)  (\w+)", line).groups()
        assert re.fullmatch(r"█*[▏▎▍▌▋▊▉]? *", bar) and name in PLACES
        assert abs(len(bar.rstrip(" ")) - 20 * float(share)) <= 1.2
        shares.append(float(share))
    assert shares[0] >= shares[1] >= shares[2] and shares[0] > 0.5
    assert [lines[1].split()[-1], lines[5].split()[-1]] == ["Oslo", "Kyiv"]


def test_ask_shows_probabilities_of_a_softmax_too(works, text, tmp_path):
    settings = [
        "--table",
        "identity",
        "--loss",
        "softmax",
        "--hidden",
        "16",
        "--epochs",
        "9",
        "--batch-size",
        "10",
        "--rerank",
        "0",
    ]
    works("train", text[0], "--out", tmp_path / "run", *settings)
    lines = works("ask", tmp_path / "run", "Oslo", "--top-k", "6").splitlines()[1:]
    assert lines[0].endswith("Oslo") and sum(float(line[23:27]) for line in lines) == pytest.approx(1, abs=0.03)
    names = [line[29:] for line in lines]
    found = json.loads(works("ask", tmp_path / "run", "Oslo", "--top-k", "6", "--json"))["answers"]
    assert [each["name"] for each in found] == names and max(each["score"] for each in found) > 0  # logits, as asked


def test_ask_as_json(works, text):
    lines = works("ask", text[1], "Rome", "東京", "--top-k", "2", "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert [each["text"] for each in found] == ["Rome", "東京"] and "東京" in lines[1]
    top = Run.open(text[1]).load().predict_topk(["Rome"], 2)
    names = [PLACES[k] for k in top.labels[0]]
    assert found[0]["answers"] == [
        {"label": k, "name": name, "score": s} for k, name, s in zip(top.labels[0], names, top.scores[0].tolist(), strict=True)
    ]


def test_a_calibrated_run_is_believed(works, mach, text, tmp_path):
    run, held = tmp_path / "run", tmp_path / "held.tsv"
    held.write_text("".join(f"{name} {word}\t{name}\n" for name in PLACES for word in ("region", "airport", "old town")))
    works("prepare", text[0].parent / "train.tsv", "--dev", held, "--out", tmp_path / "data")
    settings = ["--buckets", "4", "--repetitions", "4", "--hidden", "16", "--epochs", "9", "--batch-size", "10"]
    works("train", tmp_path / "data", "--out", run, *settings)
    before = json.loads(works("ask", run, "Oslo airport", "--json"))["answers"]
    assert list(before[0]) == ["label", "name", "score"]
    works("calibrate", run, tmp_path / "data", "--top-k", "6")
    after = json.loads(works("ask", run, "Oslo airport", "--json"))["answers"]
    found = load_calibration(run, Run.open(run).load())
    assert [each["probability"] for each in after] == pytest.approx(found.probabilities([each["score"] for each in before]))
    assert [{**each, "probability": 0} for each in after] == [{**each, "probability": 0} for each in before]
    (line,) = works("ask", run, "Oslo airport", "--top-k", "1").splitlines()[1:]
    assert f" {after[0]['probability']:.2f}  Oslo" in line
    status, out, err = mach("ask", run, "Oslo airport", "--json", "--repetitions", "2")
    assert status == 0 and "probability" not in out
    assert re.fullmatch(r"mach ask: not calibrated: .*repetitions 0-3 there, 0-1 now.*\n", err)


def test_ask_bad_input(fails, run, text, tmp_path):
    fails("the model was trained on features, not on text", "ask", run, "Rome")
    fails(r"k=7 must lie in \[1, 6\], the number of labels", "ask", text[1], "Rome", "--top-k", "7")
    fails("nowhere: is not a run folder", "ask", tmp_path / "nowhere", "Rome")
    fails("is a data set, not a run folder", "ask", text[0], "Rome")


# compare


def test_compare(works, mach, tiny, tmp_path):
    """In processes of its own, as a user has it; what it measures is tested in compare/."""
    file = tmp_path / "c.toml"
    settings = '[base]\nhidden = 8\nbuckets = 13\nrepetitions = 2\nepochs = 1\n[[configurations]]\nname = "small"\n'
    file.write_text(settings + '[[configurations]]\nname = "full"\ntable = "identity"\n')
    args = ["compare", tiny.path, "--out", tmp_path / "out", "--config", file]
    out = works(*args)
    assert out.startswith(f"{tiny.path}: train 200, test 60, dev 40 samples, 50 features, 40 labels\n[1/2] small\n[2/2] full\n")
    assert re.search(
        r"^configuration +P@1 +P@3 +P@5 +train +parameters +on disk +a query +peak memory +predicted *$", out, flags=re.M
    )
    assert re.search(r"^training, % of the time +encoder +head forward +head backward +update +rest *$", out, flags=re.M)
    assert re.search(r"^small .*x", out, flags=re.M) and re.search(r"^full ", out, flags=re.M)
    assert out.endswith(f"report: {tmp_path}/out/report.html\n")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"small", "full", "report.html", "results.json"}


def test_compare_bad_input(fails, tiny, text, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[[configurations]]\nname = "small"\nhiden = 8\n')
    compare = ["--out", tmp_path / "out", "--config", file]
    fails(r"c.toml, 'small': unknown key 'hiden'; did you mean 'hidden'\?", "compare", tiny.path, *compare)
    file.write_text('[[configurations]]\nname = "small"\nhidden = 8\n')
    fails("nowhere: is not a data set", "compare", tmp_path / "nowhere", *compare)
    fails("absent.toml: cannot be read", "compare", tiny.path, *compare[:3], tmp_path / "absent.toml")
    assert not (tmp_path / "out").exists()


# inspect, verify, plan


def test_inspect(works, run, tmp_path):
    lines = works("inspect", run).splitlines()
    assert lines[0] == f"{run}: hashed table, 40 labels, 13 buckets, width 8, 50 features"
    assert "buckets=13, repetitions=2, seed=0, hidden=8" in lines[1]
    told = r"525 parameters, \d+\.\d s of training, [\d.]+ [MG]B of memory at most"
    assert all(re.fullmatch(f"repetition {r}: {told}", lines[2 + r]) for r in (0, 1))
    assert re.fullmatch(r"group-0-1: finished, \d+\.\d s, [\d,]+ samples/s, [\d.]+ [MG]B of memory at most", lines[4])
    assert re.fullmatch(r"  loss +\d+\.\d{3} [▁▂▃▄▅▆▇█]+ \d+\.\d{3}", lines[5])
    parts = {line[2:15].strip() for line in lines[7:]}
    steps = {"forward", "head forward", "head backward", "update", "backward", "rows"}
    others = {"data", "watch", "validation", "checkpoint", "log"}
    assert {"forward", "head forward", "head backward", "backward"} <= parts <= steps | others
    without_logs = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("logs"))
    lines = works("inspect", without_logs).splitlines()[2:]
    assert re.fullmatch(f"repetition 0: {told}", lines[0]) and "head backward" in {line[2:15].strip() for line in lines[1:]}
    broken = shutil.copytree(run, tmp_path / "run")
    weights = Run.open(broken).weights_path(0)
    weights.write_bytes(weights.read_bytes()[:-10])
    with open(broken / "logs" / "group-0-1.jsonl", "a") as log:
        log.write('{"step": 9, "lo')  # the disk was full
    assert re.search(r"^repetition 0 is cut short or changed: \d+ bytes instead of \d+$", works("inspect", broken), flags=re.M)


def test_inspect_as_json(works, run):
    found = json.loads(works("inspect", run, "--json"))
    assert found["manifest"]["format"] == 1 and found["problems"] == {}
    assert found["repetitions"]["1"]["parameters"] == 525
    group = found["groups"]["group-0-1"]
    assert group["step"] == group["n_steps"] == 4 and group["finished"] and group["parts_s"]["head forward"] > 0
    assert [at for at, _ in group["loss"]] == [1, 4]


def test_inspect_tells_of_a_calibration(works, fails, run, tiny, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    assert "calibration" not in works("inspect", run) and json.loads(works("inspect", run, "--json"))["calibration"] is None
    works("calibrate", run, tiny.path, "--top-k", "9")
    (line,) = [line for line in works("inspect", run).splitlines() if line.startswith("calibration")]
    found = json.loads(works("inspect", run, "--json"))["calibration"]
    assert found["of"]["split"] == "dev" and set(found["measured"]) == {"before", "after"}
    errors = ", ".join(f"ECE@{k} {found['measured']['after'][f'ECE@{k}']:.4f}" for k in (1, 5, 9))
    assert line == f"calibration: isotonic, fitted on 40 samples of dev, logits of repetitions 0-1; {errors}"
    flip_a_byte(run / "calibration.json")
    fails("calibration.json: is broken .*; make it again with `mach calibrate`", "inspect", run)


def test_inspect_draws(works, fails, run, tmp_path):
    assert works("inspect", run, "--plot", tmp_path / "a.png").endswith(f"plot: {tmp_path}/a.png\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_bad_input(fails, tiny, run, tmp_path):
    fails("is a data set, not a run folder", "inspect", tiny.path)
    other = shutil.copytree(run, tmp_path / "run")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    fails("has model format 0, this version of mach reads format 1", "inspect", other)


def test_verify_a_run(works, fails, text, run, tmp_path):
    assert works("verify", run) == f"{run}: 2 repetitions, every file matches its checksum\n"
    broken = shutil.copytree(text[1], tmp_path / "run")
    flip_a_byte(Run.open(broken).weights_path(2))
    fails("run: repetition 2 has changed: repetition-002.safetensors does not match its checksum", "verify", broken)
    flip_a_byte(broken / "label_names_blob.npy")
    fails("repetition 2 has changed: .*; label_names_blob.npy has changed", "verify", broken)
    Run.open(broken).weights_path(0).unlink()
    fails("repetition 0 is missing its weights", "verify", broken)


def test_verify_a_data_set(works, fails, tiny, tmp_path):
    assert works("verify", tiny.path) == f"{tiny.path}: every file matches its checksum\n"
    broken = shutil.copytree(tiny.path, tmp_path / "data")
    flip_a_byte(broken / "test" / "labels_indices.npy")
    fails("data: is damaged: test/labels_indices.npy has changed; prepare it again", "verify", broken)
    fails("nowhere: is not a run folder", "verify", tmp_path / "nowhere")


def test_plan(works):
    out = works("plan", "--labels", "3m", "--features", "100k", "--memory", "8GiB")
    assert out.startswith("3,000,000 labels: --buckets 16384 --repetitions 8 --hidden 512\n")
    rows = {line[:26].strip(): line[26:].split() for line in out.splitlines()[4:]}
    assert rows["parameters"] == [f"{8 * (100_001 * 512 + 16384 * 513):,}", f"{100_001 * 512 + 3_000_000 * 513:,}"]
    assert rows["FLOPs a sample, heads"] == [f"{2 * 8 * 16384 * 512:,}", f"{2 * 3_000_000 * 512:,}"]
    assert "give --features" not in out and "give --features to count them" in works("plan", "--labels", "1000")
    assert int(rows["bytes at the peak"][0].replace(",", "")) > int(rows["bytes to train at once"][0].replace(",", ""))
    for of in (0, 1):
        shares = [float(rows[name][of]) for name in ("encoder, %", "head forward, %", "head backward, %", "update, %")]
        assert sum(shares) == pytest.approx(100, abs=0.3) and float(rows["step of 256 samples, ms"][of].replace(",", "")) > 0
    assert re.fullmatch(r"estimated with [\d,.]+ GFLOP/s of \w+ products and [\d.]+ GB/s of memory, .*", out.splitlines()[-1])
    plain, roomy, tight = (
        json.loads(works("plan", "--labels", "1000000", "--json", *more))
        for more in ([], ["--memory", "1T"], ["--memory", "90M"])
    )
    forecasts = [found.pop("forecast") for found in (plain, roomy)]
    assert forecasts[0]["full"]["peak_bytes"] == forecasts[1]["full"]["peak_bytes"] > 2 * 1_000_000 * 512
    assert forecasts[0]["rates"]["flops"] > 0 and forecasts[0]["hashed"]["parts_s"]["update"] > 0
    assert plain == roomy and tight["hashed"]["training_bytes"] <= 90_000_000 < plain["hashed"]["training_bytes"]


def test_plan_counts_the_second_stage_where_samples_are_known(works, fails):
    args = ["plan", "--labels", "10k", "--features", "20k", "--active-features", "30"]
    assert "second stage, which orders the first labels anew; give --samples to count it, too" in works(*args)
    one_label = works(*args, "--samples", "1m", "--labels-a-sample", "1.2")
    assert one_label.startswith("10,000 labels: --buckets 4096 --repetitions 3 --hidden 512\n")  # two might be confused: --delta
    out = works(*args, "--samples", "1m", "--labels-a-sample", "4.5")
    rows = {line[:26].strip(): line[26:].split() for line in out.splitlines()[4:]}
    assert out.startswith("10,000 labels: --buckets 1024 --repetitions 8 --hidden 512\n")
    few = works(*args, "--samples", "10k"), works(*args, "--samples", "10k", "--hidden", "300")
    assert [text.partition("\n")[0].rpartition(" ")[2] for text in few] == ["256", "300"]
    assert "give --samples" not in out and rows["bytes at the peak"][0] == rows["second stage, peak bytes"][0]
    told = json.loads(works(*args, "--samples", "1m", "--labels-a-sample", "4.5", "--json"))["forecast"]
    hashed, full = (told[head]["second"] for head in ("hashed", "full"))
    assert rows["second stage, parameters"] == [f"{hashed['parameters']:,}", f"{full['parameters']:,}"]
    assert rows["second stage, peak bytes"] == [f"{hashed['peak_bytes']:,}", f"{full['peak_bytes']:,}"]
    assert hashed["disk_bytes"] == full["disk_bytes"] > 100 * 10**6
    fails("samples=5 needs --features: the second stage has weights of them", "plan", "--labels", "100", "--samples", "5")
    fails("labels_a_sample=0 must be above 0", *args, "--samples", "5", "--labels-a-sample", "0")


def test_plan_bad_input(fails):
    fails(
        "memory=1048576 bytes is too little: the smallest sizes for 3000000 labels take",
        "plan",
        "--labels",
        "3m",
        "--memory",
        "1Mi",
    )
    fails(r"n_labels=1 must lie in \[2, \d+\]", "plan", "--labels", "1")
    fails(r"delta=2.0 must lie in \(0, 1\)", "plan", "--labels", "100", "--delta", "2")


# The small functions


@given(st.integers(0, 2**53), st.sampled_from(["", "b", "B"]))
def test_a_plain_count_is_read_back(n, byte):
    assert count(f"{n}{byte}") == n


@given(st.integers(0, 10**6), st.sampled_from(list(UNITS)), st.sampled_from(["", "b", "B"]), st.booleans())
def test_units_of_counts(n, unit, byte, upper):
    assert count(f"{n}{unit.upper() if upper else unit}{byte}") == n * UNITS[unit]


@given(st.text())
def test_what_is_no_count_is_refused_by_name(text):
    try:
        assert count(text) == count(text.strip())
    except ArgumentTypeError as error:
        assert str(error) == f"{text!r} is not a count such as 3000000, 3m, 8G or 8GiB"


@pytest.mark.parametrize(("text", "n"), [("3m", 3 * 10**6), ("8GiB", 8 << 30), ("8G", 8 * 10**9), ("1.5k", 1500), ("2e3", 2000)])
def test_counts_as_people_write_them(text, n):
    assert count(text) == n


@pytest.mark.parametrize("text", ["", "m", "3x", "3mm", "nan", "inf", "1e999", "GiB"])
def test_counts_that_are_none(text):
    with pytest.raises(ArgumentTypeError, match="is not a count"):
        count(text)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"mach {version('mach')}\n"


def test_rerank(works, tiny, tmp_path):
    works("train", tiny.path, "--out", tmp_path / "run", *SMALL, "--repetitions", "2")
    said = works("rerank", tmp_path / "run", tiny.path, "--rerank", "5", "--rerank-weight", "2")
    assert re.search(
        r"re-ranker of a sample's 5 best labels: [\d,]+ parameters, [\d.]+ k?B, by logit \+ 2 margin, chosen on the dev split, "
        r"\d+\.\d s of fitting",
        said,
    )
    assert said.strip().removeprefix(f"{tmp_path / 'run'}: ") in works("inspect", tmp_path / "run")
    for name, flags in (("with", []), ("without", ["--no-rerank"])):
        works("predict", tmp_path / "run", tiny.path, "--top-k", "3", "--out", tmp_path / name, *flags)
    assert pq.read_table(tmp_path / "with") != pq.read_table(tmp_path / "without")
