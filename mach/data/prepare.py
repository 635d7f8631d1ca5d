"""Make a data set from files: `mach prepare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mach.data.blocks import Block, line_blocks, opened
from mach.data.dataset import MANIFEST, Dataset, read_manifest
from mach.data.grams import Span
from mach.data.lines import read_svmlight, read_xc
from mach.data.matrices import read_npz
from mach.data.sources import Sources, find_sources
from mach.data.tables import Vocabulary, decode_lines, read_parquet, read_tsv
from mach.data.text import TextVectorizer
from mach.data.threads import ordered
from mach.data.writer import DatasetWriter, SplitWriter, agreed_sizes, check_label_names, reporting_os_errors, writing_dataset
from mach.errors import DataError

Progress = Callable[[int, int], None]  # bytes done, bytes in all
_CHUNK_BYTES = 1 << 20  # of text, turned into features at a time


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    test: str | Path | None = None,
    dev: str | Path | None = None,
    format: str = "auto",
    word_ngrams: Span | None = (1, 2),
    char_ngrams: Span | None = (2, 4),
    hash_bits: int = 20,
    min_df: int = 2,
    max_features: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Make a data set of files, in blocks, so that files may be larger than memory (all but .npz).

    Args:    source, the train split's file, or a folder of {train,test,dev}.{txt,svm,svmlight,libsvm,npz,parquet,tsv}, perhaps
             with labels.txt (a label name a line) and train_text.txt, ... (a document a line, kept beside the features);
             out, the data set's folder: absent or empty, or already made of the very same files, when it is returned at once;
             format, one of auto, xc, svmlight, npz, parquet, tsv (see the readers in lines.py, matrices.py, tables.py);
             word_ngrams to max_features, how text becomes features (see TextVectorizer.fit), for tsv and Parquet text;
             progress, called with (bytes done, bytes in all); text counts twice, for reading and for its features.
    Sizes:   F and K come from the files where they say (xc, npz, dense Parquet) and must agree between splits; otherwise
             they are one more than the largest id of all splits, and K at least the number of lines of labels.txt.
             svmlight feature ids count from 0, or from 1 if no split has an id below 1; label ids always count from 0.
             Label names get ids in order of first appearance, train first; those only in test or dev are labels, too.
    Rows:    values of a feature that a row names twice are summed, a label named twice is kept once.
    Raises:  DataError naming file and line, or the path that cannot be written. Whatever was at `out` is left as it was.
    """
    sources = find_sources(Path(source), {"test": test, "dev": dev}, format)
    text = {"word_ngrams": word_ngrams, "char_ngrams": char_ngrams, "hash_bits": hash_bits, "min_df": min_df}
    text_options = {**text, "max_features": max_features} if sources.are_text else {}
    stamp = _plain(sources.stamp(text_options))
    if _was_made_from(Path(out), stamp):
        return Dataset.open(out)
    try:
        with writing_dataset(Path(out)) as writer:
            _convert(
                sources, writer, text_options, _Counter(progress, sources.total_bytes * (2 if sources.are_text else 1)), stamp
            )
    except DataError:
        if not _was_made_from(Path(out), stamp):  # otherwise another process was faster
            raise
    return Dataset.open(out)


def _plain(stamp: dict[str, Any]) -> dict[str, Any]:
    """Give a stamp as JSON gives it back: tuples as lists."""
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in stamp["options"].items()}
    return {**stamp, "options": options}


def _was_made_from(out: Path, stamp: dict[str, Any]) -> bool:
    return (out / MANIFEST).is_file() and read_manifest(out).get("made_from") == stamp


@dataclass(slots=True)
class _Counter:
    """Adds up the bytes of all files for the caller's progress bar."""

    callback: Progress | None
    total: int
    before: int = 0  # bytes of the files finished

    def report(self, in_this_file: int) -> None:
        if self.callback is not None:
            self.callback(min(self.before + in_this_file, self.total), self.total)

    def finish_file(self, n_bytes: int) -> None:
        self.before += n_bytes
        self.report(0)


def _convert(
    sources: Sources, writer: DatasetWriter, text_options: dict[str, Any], counter: _Counter, stamp: dict[str, Any]
) -> None:
    names = _read_strings(sources.labels) if sources.labels else []
    vocabulary = _vocabulary_of(names, sources.labels) if sources.has_label_names else Vocabulary()
    for name, path in sources.splits.items():
        _read_split(sources.format, path, writer.split(name), vocabulary, counter)
        if name in sources.texts:
            _read_texts(sources.texts[name], path, writer.split(name))
    if sources.are_text:
        _vectorize(writer, text_options, counter)
    elif sources.format == "svmlight":
        _count_from_zero(list(writer.splits.values()))
    names = vocabulary.names if sources.has_label_names else names
    n_features, n_labels = _sizes(sources, writer, len(names))
    if names:
        writer.write_label_names(names)
    writer.finish(n_features, n_labels, stamp)


def _blocks(format: str, path: Path, vocabulary: Vocabulary) -> Iterator[Block]:
    if format in ("tsv", "parquet"):
        return (read_tsv if format == "tsv" else read_parquet)(path, vocabulary)
    return {"xc": read_xc, "svmlight": read_svmlight, "npz": read_npz}[format](path)


def _read_split(format: str, path: Path, split: SplitWriter, vocabulary: Vocabulary, counter: _Counter) -> None:
    for block in _blocks(format, path, vocabulary):
        split.append_labels(block.labels)
        if block.features is not None:
            split.append_features(block.features)
        if block.text is not None:
            split.append_text(block.text)
        counter.report(block.done_bytes)
    if not split.n_samples:
        raise DataError(f"{path}: holds no samples")
    counter.finish_file(path.stat().st_size)


def _read_strings(path: Path) -> list[str]:
    """Read a string a line."""
    with opened(path) as file:
        return [line for block in line_blocks(file) for line in decode_lines(path, block)]


def _vocabulary_of(names: list[str], path: Path | None) -> Vocabulary:
    """Begin a vocabulary with the names of labels.txt, which must differ where names are what labels are given by."""
    vocabulary = Vocabulary(names)
    if len(vocabulary.names) < len(names):
        line = next(i for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"{path}:{line + 1}: names the label '{names[line]}' a second time")
    return vocabulary


def _read_texts(path: Path, beside: Path, split: SplitWriter) -> None:
    """Keep the documents that lie beside a split's features."""
    with opened(path) as file:
        for block in line_blocks(file):
            split.append_text(decode_lines(path, block))
    if split.n_texts != split.n_samples:
        raise DataError(f"{path}: {split.n_texts} lines for the {split.n_samples} samples of {beside.name}; mend or rename it")


def _vectorize(writer: DatasetWriter, options: dict[str, Any], counter: _Counter) -> None:
    """Fit a vectorizer to the train split's text, store it, and give every split its features."""
    splits = list(writer.splits.values())
    done, work = 0, splits[0].n_texts + sum(split.n_texts for split in splits)

    def counted(chunks: Iterator[list[str]]) -> Iterator[list[str]]:
        nonlocal done
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            counter.report((counter.total - counter.before) * done // work)

    vectorizer = TextVectorizer.fit(counted(splits[0].text_chunks(_CHUNK_BYTES)), **options)
    with reporting_os_errors(writer.folder):
        vectorizer.save(writer.folder / "vectorizer")
    for split in splits:
        for features in ordered(vectorizer.transform, counted(split.text_chunks(_CHUNK_BYTES))):
            split.append_features(features)


def _count_from_zero(splits: list[SplitWriter]) -> None:
    """Let svmlight's feature ids begin at 0 where they began at 1 or above in all splits."""
    if min(split.least_feature for split in splits) >= 1:
        for split in splits:
            split.shift_features(-1)


def _sizes(sources: Sources, writer: DatasetWriter, n_names: int) -> tuple[int, int]:
    """Settle F and K for all splits."""
    sizes = {str(sources.splits[name]): (split.n_features, split.n_labels) for name, split in writer.splits.items()}
    if sources.declares_sizes:
        n_features, n_labels = agreed_sizes(sizes)
    else:
        n_features, n_labels = (max(several) for several in zip(*sizes.values(), strict=True))
        if sources.has_dense_features:
            agreed_sizes({name: (width, 0) for name, (width, _) in sizes.items()})
        n_labels = max(n_labels, n_names)
    for what, size in (("feature", n_features), ("label", n_labels)):
        if size < 1:
            raise DataError(f"{sources.splits['train']}: no sample has a {what}")
    if n_names:
        check_label_names(str(sources.labels), n_names, n_labels)
    return n_features, n_labels
