"""Files to data sets: every format, its sizes, its errors, and that nothing half-made is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from mach.data import Dataset, prepare, write_dataset
from mach.data import blocks as blocks_module
from mach.errors import DataError

RNG = np.random.default_rng(0)
X = sp.random_array((60, 30), density=0.2, rng=RNG, format="csr", dtype=np.float32)
Y = sp.csr_array(sp.random_array((60, 12), density=0.15, rng=RNG, format="csr") > 0)
XC = "3 5 4\n1,3 0:1 4:0.5\n\n 2:2\n"


def put(folder: Path, **files: str | bytes) -> Path:
    """Write files; `__` in a name stands for a dot."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def xc_text(X, Y) -> str:
    lines = [f"{X.shape[0]} {X.shape[1]} {Y.shape[1]}"]
    for i in range(X.shape[0]):
        labels = ",".join(map(str, Y.indices[Y.indptr[i] : Y.indptr[i + 1]]))
        pairs = zip(X.indices[X.indptr[i] : X.indptr[i + 1]], X.data[X.indptr[i] : X.indptr[i + 1]], strict=True)
        lines.append(" ".join([labels, *(f"{f}:{v}" for f, v in pairs)]))
    return "\n".join(lines) + "\n"


def matrices(dataset: Dataset, split: str = "train"):
    part = dataset.split(split)
    features = part.features if isinstance(part.features, np.ndarray) else part.features.to_scipy().toarray()
    return features, part.labels.to_scipy().toarray()


def expect(dataset: Dataset, split: str, X, Y) -> None:
    features, labels = matrices(dataset, split)
    assert np.array_equal(features, X.toarray() if hasattr(X, "toarray") else X)
    assert np.array_equal(labels, Y.toarray())


@pytest.mark.parametrize("block_bytes", [1 << 23, 50, 7])  # blocks shorter than a line, too
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_xc_folder(tmp_path, monkeypatch, block_bytes, newline):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", block_bytes)
    text = xc_text(X, Y).replace("\n", newline)
    dev = xc_text(X[:9], Y[:9]).removesuffix("\n").replace("\n", newline)  # no newline at the end
    names = [f"label {i}" for i in range(12)]
    texts = [f"document é {i}" for i in range(9)]
    source = put(tmp_path / "src", train__txt=text, dev__txt=dev, labels__txt="\n".join(names), dev_text__txt=newline.join(texts))
    calls: list[tuple[int, int]] = []
    dataset = prepare(source, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    expect(dataset, "train", X, Y)
    expect(dataset, "dev", X[:9], Y[:9])
    assert (dataset.split_names, dataset.n_features, dataset.n_labels) == (("train", "dev"), 30, 12)
    assert dataset.label_names == names and dataset.split("dev").text == texts and dataset.split("train").text is None
    total = len(text.encode()) + len(dev.encode())
    assert calls == sorted(calls) and calls[-1] == (total, total)
    dataset.verify()


def test_rows_without_labels_or_features(tmp_path):
    source = put(tmp_path / "s", a__txt=XC + "\n\n")  # blank lines after the last sample are no samples
    features, labels = matrices(prepare(source / "a.txt", tmp_path / "out"))
    assert features.tolist() == [[1, 0, 0, 0, 0.5], [0] * 5, [0, 0, 2, 0, 0]] and labels.tolist() == [
        [0, 1, 0, 1],
        [0] * 4,
        [0] * 4,
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"train\.txt: is empty"),
        ("4 5 4\n" + XC[6:], r"train\.txt:1: the header promises 4 samples, the file has 3; is it cut short\?"),
        ("1 5 4\n" + XC[6:], r"train\.txt:3: the file goes on after as many samples as its header promises"),
        ("0 5 4\n", r"train\.txt:1: the counts 0 5 4 must be at least 1"),
        ("3 5 99999999999\n", r"train\.txt:1: the counts 3 5 99999999999 must be at least 1 and at most 2147483647"),
        ("3 5\n1 0:1\n", r"train\.txt:1: '3 5' is not a header of three counts: samples, features, labels"),
        (XC.replace("1,3", "1,4"), r"train\.txt:2: label id 4 is outside \[0, 4\); is the third number"),
        (XC.replace("2:2", "5:2"), r"train\.txt:4: feature id 5 is outside \[0, 5\); is the second number"),
        (XC.replace("2:2", "2:inf"), r"train\.txt:4: feature 2 has value inf"),
    ],
)
def test_bad_xc_text_is_named_and_leaves_nothing(tmp_path, text, message):
    source = put(tmp_path / "src", train__txt=text)
    with pytest.raises(DataError, match=message):
        prepare(source, tmp_path / "out", format="xc")
    assert [file.name for file in tmp_path.iterdir()] == ["src"]


def test_the_line_of_an_error_counts_over_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 64)
    lines = xc_text(X, Y).split("\n")
    lines[41] = "oops"
    with pytest.raises(DataError, match=r"train\.txt:42: 'oops' is neither"):
        prepare(put(tmp_path / "src", train__txt="\n".join(lines)), tmp_path / "out")


def test_surplus_lines_are_noticed_over_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 7)
    blank = put(tmp_path / "src", blank__txt=XC + "\n" * 30, more__txt=XC + "\n" * 30 + "1 1:1\n")
    assert prepare(blank / "blank.txt", tmp_path / "out").split("train").n_samples == 3
    with pytest.raises(DataError, match=r"more\.txt:5: the file goes on after as many samples as its header promises"):
        prepare(blank / "more.txt", tmp_path / "out2")


def test_splits_that_differ_in_size_are_both_named(tmp_path):
    source = put(tmp_path / "src", train__txt=XC, test__txt=XC.replace("3 5 4", "3 5 6"), other__txt=XC.replace("3 5 4", "3 7 4"))
    with pytest.raises(DataError, match=r"train\.txt has 4 labels and .*test\.txt has 6; the splits of a data set must agree"):
        prepare(source, tmp_path / "out")
    with pytest.raises(DataError, match=r"train\.txt has 5 features and .*other\.txt has 7"):
        prepare(source, tmp_path / "out", test=source / "other.txt")


def test_svmlight_equals_scikit_learn(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    rows = [list(Y.indices[Y.indptr[i] : Y.indptr[i + 1]]) for i in range(60)]
    for name, low in (("train.svm", 0), ("test.svm", 20)):
        dump_svmlight_file(X[low:], Y[low:].astype(int), str(source / name), multilabel=True, zero_based=True, comment="made up")
    dataset = prepare(source, tmp_path / "out")
    expected, labels = load_svmlight_file(
        str(source / "train.svm"), multilabel=True, zero_based=True, n_features=30, dtype=np.float32
    )
    assert np.array_equal(matrices(dataset)[0], expected.toarray()[: len(labels)])
    assert [tuple(np.flatnonzero(row)) for row in matrices(dataset)[1]] == [tuple(map(int, row)) for row in labels]
    kept = [i for i in range(20, 60) if rows[i] or X.indptr[i] < X.indptr[i + 1]]
    expect(dataset, "test", X[kept], Y[kept])


def test_svmlight_ids_from_one_are_shifted_only_if_no_split_has_a_zero(tmp_path):
    source = put(tmp_path / "src", train__svm="0 1:1 3:2\n2 2:1\n", test__svm="1 5:1\n", zero__svm="1 0:1\n")
    dataset = prepare(source, tmp_path / "one")
    assert (dataset.n_features, dataset.n_labels) == (5, 3)
    assert matrices(dataset)[0].tolist() == [[1, 0, 2, 0, 0], [0, 1, 0, 0, 0]]
    dataset = prepare(source, tmp_path / "zero", dev=source / "zero.svm")
    assert dataset.n_features == 6 and matrices(dataset)[0].tolist() == [[0, 1, 0, 2, 0, 0], [0, 0, 1, 0, 0, 0]]


def test_names_without_samples_are_labels_too(tmp_path):
    dataset = prepare(put(tmp_path / "src", train__svm="0 1:1\n", labels__txt="a\nb\nc\n"), tmp_path / "out")
    assert dataset.n_labels == 3 and list(dataset.label_names) == ["a", "b", "c"]


def test_text_files_without_header_are_svmlight(tmp_path):
    dataset = prepare(put(tmp_path / "src", train__txt="1,2 3:1\n0 0:1\n"), tmp_path / "out")
    assert (dataset.n_features, dataset.n_labels) == (4, 3)


@pytest.mark.parametrize(("text", "what"), [("0\n1\n", "feature"), (" 3:1\n", "label"), ("# nothing\n", None)])
def test_files_without_content_are_refused(tmp_path, text, what):
    with pytest.raises(DataError, match=f"train.svm: no sample has a {what}" if what else r"train.svm: holds no samples"):
        prepare(put(tmp_path / "src", train__svm=text), tmp_path / "out")


def parts(name: str, matrix) -> dict[str, np.ndarray]:
    return {f"{name}_{part}": np.asarray(getattr(matrix, part)) for part in ("data", "indices", "indptr", "shape")}


def test_npz(tmp_path):
    np.savez(tmp_path / "train.npz", **parts("X", X), **parts("Y", Y))
    np.savez_compressed(tmp_path / "dev.npz", X=X.toarray().astype(np.float64), **parts("Y", Y))
    expect(prepare(tmp_path / "train.npz", tmp_path / "sparse"), "train", X, Y)
    expect(prepare(tmp_path / "dev.npz", tmp_path / "dense"), "train", X.toarray(), Y)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X_shape": None}, r"has no array X_shape \(has: .*\); wanted: X_data"),
        ({"Y_indices": Y.indices + 5}, r"Y is not a CSR matrix: indices must be < 12"),
        ({"X_indptr": X.indptr[:-1]}, r"X is not a CSR matrix"),
        ({"X_indices": X.indices * 0.5}, r"X_indices, _indptr and _shape must be integers, X_data numbers"),
        ({"X_data": np.array(["a"] * X.nnz)}, r"X_indices, _indptr and _shape must be integers, X_data numbers"),
        ({"X_data": np.array([None] * X.nnz)}, r"is not a readable \.npz file of plain arrays"),
        ({"X_data": np.where(np.arange(X.nnz) == 0, np.nan, 1)}, r"row \d+ of X: feature \d+ has value nan"),
        ({"X": np.ones(3)}, r"X must be a matrix of numbers, got float64 of shape \(3,\)"),
        ({"X": np.ones((3, 2))}, r"X has 3 rows and Y has 60; they must be equally many"),
    ],
)
def test_bad_npz_is_named(tmp_path, arrays, message):
    merged = {**parts("X", X), **parts("Y", Y), **arrays}
    np.savez(tmp_path / "t.npz", **{name: array for name, array in merged.items() if array is not None})
    with pytest.raises(DataError, match=rf"t\.npz: {message}"):
        prepare(tmp_path / "t.npz", tmp_path / "out")


@pytest.mark.parametrize("name", ["t.npz", "t.parquet"])
def test_a_file_that_is_something_else_is_named(tmp_path, name):
    (tmp_path / name).write_text("1 2 3\n" * 9)
    with pytest.raises(DataError, match=rf"{name}: is not a readable"):
        prepare(tmp_path / name, tmp_path / "out")


def lists(matrix, values: bool = False) -> list[list[float]]:
    source = matrix.data if values else matrix.indices
    return [source[a:b].tolist() for a, b in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)]


def write_parquet(path: Path, row_group_size: int = 25, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def test_parquet_sparse_and_dense(tmp_path):
    indices = pa.array(lists(X), pa.list_(pa.int32()))
    sparse = write_parquet(tmp_path / "s.parquet", indices=indices, values=lists(X, True), labels=lists(Y), other=["x"] * 60)
    expect(prepare(sparse, tmp_path / "sparse"), "train", X[:, : X.indices.max() + 1], Y[:, : Y.indices.max() + 1])
    features = pa.FixedSizeListArray.from_arrays(pa.array(X.toarray().ravel(), pa.float64()), 30)
    dense = write_parquet(tmp_path / "d.parquet", features=features, labels=pa.array(lists(Y), pa.large_list(pa.int64())))
    expect(prepare(dense, tmp_path / "dense"), "train", X.toarray(), Y[:, : Y.indices.max() + 1])


TEXTS = ["New York", "york minster", "new minster", "", "york"]
NAMED = [["US", "a\nb"], ["GB"], ["GB", "US", "GB"], [], None]


def test_parquet_and_tsv_text_give_the_same(tmp_path):
    plain = [[name.replace("\n", " ") for name in names or []] for names in NAMED]
    put(
        tmp_path,
        t__tsv="".join(f"{t}\t{'|'.join(names)}\n" for t, names in zip(TEXTS, plain, strict=True)),
        u__tsv="york\tUS|FR\n",
    )
    write_parquet(tmp_path / "t.parquet", 2, text=TEXTS, labels=NAMED)
    write_parquet(tmp_path / "u.parquet", 2, text=["york"], labels=[["US", "FR"]])
    options = {"hash_bits": 10, "max_features": 20}
    a = prepare(tmp_path / "t.tsv", tmp_path / "a", test=tmp_path / "u.tsv", **options)
    b = prepare(tmp_path / "t.parquet", tmp_path / "b", test=tmp_path / "u.parquet", **options)
    assert list(a.label_names) == ["US", "a b", "GB", "FR"] and list(b.label_names) == ["US", "a\nb", "GB", "FR"]
    for dataset in (a, b):
        assert (dataset.n_features, dataset.n_labels, dataset.split("train").text) == (20, 4, TEXTS)
        assert matrices(dataset)[1].tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [0] * 4, [0] * 4]
        assert matrices(dataset, "test")[1].tolist() == [[1, 0, 0, 1]]
        vectorizer = dataset.vectorizer
        assert np.array_equal(vectorizer.transform(TEXTS).to_scipy().toarray(), matrices(dataset)[0])
        assert np.array_equal(vectorizer.transform(["york"]).to_scipy().toarray(), matrices(dataset, "test")[0])
        dataset.verify()
    assert np.array_equal(matrices(a)[0], matrices(b)[0])


def test_names_in_a_labels_file_come_first(tmp_path):
    source = put(tmp_path / "src", train__tsv="a b\tred\na b\tblue\n", labels__txt="green\nblue\n")
    dataset = prepare(source, tmp_path / "out")
    assert list(dataset.label_names) == ["green", "blue", "red"] and matrices(dataset)[1].tolist() == [[0, 0, 1], [0, 1, 0]]
    put(source, labels__txt="green\nblue\ngreen\n")
    with pytest.raises(DataError, match=r"labels\.txt:3: names the label 'green' a second time"):
        prepare(source, tmp_path / "out2")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [1, 2], "labels": [[1], [2]]}, r"column text has type int64; allowed: string"),
        ({"text": ["a", "b"], "labels": ["1", "2"]}, r"column labels has type string; allowed: list<int64> or list<string>"),
        (
            {"text": ["a", "b"], "labels": [[0.5], []]},
            r"column labels has type list<.*double>; allowed: list<int64> or list<string>",
        ),
        ({"features": [[1], [2]], "labels": [[1], [2]]}, r"column features has type list<.*int64>; allowed: list<float>"),
        ({"words": ["a"], "labels": [[1]]}, r"has columns words, labels; wanted: text, or features, or indices and values"),
        ({"text": ["a"]}, r"has no column labels \(has: text\); its type is list<int64> or list<string>"),
        ({"text": ["a", None], "labels": [[1], [2]]}, r"row 1: column text is null"),
        ({"text": ["a", "b"], "labels": [[1], [2, None]]}, r"row 1: column labels has a null inside its list"),
        ({"text": ["a", "b"], "labels": [[], [1, -2]]}, r"row 1: column labels has id -2; ids lie in \[0, 2147483647\)"),
        ({"indices": [[1], [2]], "values": [[0.5], []], "labels": [[1], [2]]}, r"row 1: has 1 indices and 0 values"),
        ({"indices": [[1], [2]], "values": [[0.5], [np.nan]], "labels": [[1], [2]]}, r"row 1: feature 2 has value nan"),
        ({"features": [[1.0, 2.0], [3.0]], "labels": [[1], [2]]}, r"row 1: has 1 features, rows before have 2"),
        ({"features": [[1.0, 2.0], [3.0, 1e39]], "labels": [[1], [2]]}, r"row 1: feature 1 has value inf"),
    ],
)
def test_bad_parquet_is_named(tmp_path, columns, message):
    path = write_parquet(tmp_path / "t.parquet", 1, **columns)
    with pytest.raises(DataError, match=rf"t\.parquet: {message}"):
        prepare(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tx\nb\n", r"t\.tsv:2: has 0 tabs; a line is text, one tab, label\|label \(or no label\)"),
        ("a\tx\nb\tc\td\n", r"t\.tsv:2: has 2 tabs"),
        ("a\tx\nb\tc||d\n", r"t\.tsv:2: 'c\|\|d' has an empty label name; labels are separated by one \|"),
        (b"a\tx\nb\xff\tc\n", r"t\.tsv:2: byte 0xff is not UTF-8; convert the file to UTF-8"),
        ("a\t\nb\t\n", r"no n-gram occurs in 2 or more of the 2 training documents"),
        ("ab\t\nab\t\n", r"t\.tsv: no sample has a label"),
    ],
)
def test_bad_tsv_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        prepare(put(tmp_path / "src", t__tsv=text) / "t.tsv", tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"test__txt": XC}, {}, r"src: holds no train split, a file train with one of the endings \.libsvm, \.npz, \.parquet, "),
        ({"train__txt": XC, "train__tsv": "a\tb\n"}, {}, r"src: both train\.txt and train\.tsv are there; choose with --format"),
        (
            {"train__txt": XC, "test__tsv": "a\tb\n"},
            {},
            r"train\.txt has format xc and .*test\.tsv has tsv; all splits must have one",
        ),
        (
            {"train__txt": XC},
            {"format": "svm-light"},
            r"format 'svm-light' must be one of auto, xc, .*; did you mean 'svmlight'\?",
        ),
        ({"train__txt": XC}, {"dev": "none.txt"}, r"none\.txt: cannot be read \(No such file or directory\)"),
        ({"train__txt": XC}, {"dev": "."}, r"\.: cannot be read \(Is a directory\)"),
        (
            {"train__txt": XC},
            {"dev": sys.executable},
            r"its format cannot be told from its ending; give --format, one of xc, svmlight",
        ),
        ({"train__txt": XC, "labels__txt": "a\nb\n"}, {}, r"labels\.txt: 2 label names for 4 labels; there must be one for each"),
        ({"train__svm": "9 1:1\n", "labels__txt": "a\nb\n"}, {}, r"labels\.txt: 2 label names for 10 labels"),
        (
            {"train__txt": XC, "train_text__txt": "a\nb\n"},
            {},
            r"train_text\.txt: 2 lines for the 3 samples of train\.txt; mend or rename it",
        ),
    ],
)
def test_bad_sources_are_named(tmp_path, files, options, message):
    with pytest.raises(DataError, match=message):
        prepare(put(tmp_path / "src", **files), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: cannot be read \(No such file or directory\)"):
        prepare(tmp_path / "nowhere.txt", tmp_path / "out")


def test_the_very_same_sources_are_prepared_once(tmp_path):
    source = put(tmp_path / "src", train__tsv="a b\tc\na b\td\n")
    dataset = prepare(source, tmp_path / "out")
    before = (dataset.path / "manifest.json").stat().st_mtime_ns
    assert prepare(source, tmp_path / "out").fingerprint == dataset.fingerprint
    assert (dataset.path / "manifest.json").stat().st_mtime_ns == before
    refused = "holds another data set, which is left alone"
    with pytest.raises(DataError, match=refused):
        prepare(source, tmp_path / "out", min_df=1)
    put(source, train__tsv="a b\tc\na b\te\n")
    os.utime(source / "train.tsv", ns=(0, 0))
    with pytest.raises(DataError, match=refused):
        prepare(source, tmp_path / "out")
    write_dataset(tmp_path / "mine", {"train": (X, Y)})
    with pytest.raises(DataError, match=refused):
        prepare(source, tmp_path / "mine")
    assert Dataset.open(tmp_path / "out").fingerprint == dataset.fingerprint


def test_a_killed_conversion_leaves_no_data_set_and_a_rerun_is_clean(tmp_path):
    source = put(tmp_path / "src", train__txt=XC)
    script = f"""
        import os, signal
        from mach.data import prepare
        prepare({str(source)!r}, {str(tmp_path / "out")!r}, progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob(".out.*.tmp"))) == 1
    assert prepare(source, tmp_path / "out").n_labels == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "src"]


def test_two_processes_may_prepare_the_same_at_once(tmp_path):
    source = put(tmp_path / "src", train__txt=XC)
    script = f"from mach.data import prepare; prepare({str(source)!r}, {str(tmp_path / 'out')!r})"

    def other_is_faster(done: int, total: int) -> None:
        if not (tmp_path / "out").exists():
            subprocess.run([sys.executable, "-c", script], check=True)

    prepare(source, tmp_path / "out", progress=other_is_faster).verify()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "src"]


def test_importing_data_loads_neither_scikit_learn_nor_pyarrow():
    script = "import sys, mach.data; sys.exit(', '.join({'sklearn', 'pyarrow', 'torch', 'pandas'} & set(sys.modules)) or 0)"
    child = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "")
