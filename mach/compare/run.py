"""Train several configurations on one data set, each in a process of its own, and measure all of them alike."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mach.compare.evaluate import evaluator_for
from mach.compare.report import write_report
from mach.compare.rows import Facts, Row
from mach.config import Config, read_toml
from mach.data import CSR, Dataset, take_rows
from mach.decoding import decode_topk
from mach.errors import ConfigError, DataError, ModelError, Stopped, nearest
from mach.files import clear_leftovers, write_json
from mach.model import DEFAULT_ESTIMATOR, Model
from mach.parallel import train
from mach.parallel.devices import devices_of
from mach.parallel.memory import group_bytes
from mach.parallel.second import Samples, second_stage
from mach.store import Run
from mach.store.reranker import reranker_record
from mach.train.clock import Clock
from mach.train.stop import Stop

SPLIT = "test"
TOP_K = 100
KEYS = ("base", "configurations")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Named:
    """A configuration and what to call it: the name of its run folder and its row."""

    name: str
    config: Config


def read_configurations(path: str | Path) -> list[Named]:
    """Read a comparison's TOML: settings shared by all under [base], then one [[configurations]] each, with a name.

    Raises: ConfigError naming what is missing or unknown.
    """
    values = read_toml(path)
    for key in values:
        if key not in KEYS:
            raise ConfigError(f"{path}: unknown key '{key}'{nearest(key, KEYS)} (known: {', '.join(KEYS)})")
    base, entries = values.get("base", {}), values.get("configurations", [])
    if not (isinstance(base, dict) and isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        raise ConfigError(f"{path}: base and configurations must be tables: write [base] and [[configurations]]")
    found = []
    for number, entry in enumerate(entries, 1):
        name = entry.pop("name", None)
        if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
            raise ConfigError(f"{path}: configuration {number} needs a name that can be a folder's, got {name!r}")
        found.append(Named(name, Config.from_dict({**base, **entry}, where=f"{path}, '{name}'")))
    names = [named.name for named in found]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"{path}: needs [[configurations]] with different names, got {names or 'none'}")
    return found


def compare(
    dataset: Dataset,
    out: str | Path,
    configurations: Sequence[Named],
    *,
    device: str = "auto",
    workers: int | None = None,
    progress: bool = False,
    say: Say = lambda _: None,
) -> list[Row]:
    """Train, decode and evaluate each configuration; write results.json and report.html; a second call trains only what is left.

    Each configuration trains and decodes in a fresh process, so that its peak memory is its own.

    Raises: DataError without a test split, or if the report cannot be written; ConfigError or ModelError as `mach.train`, for
            any of the configurations, before the first is trained; Stopped as `mach.train`, before the next configuration.
    """
    out = Path(out)
    dataset.split(SPLIT)  # refuse at once what could only fail after hours
    for named in configurations:
        Run.create(out / named.name, named.config, dataset)
    rows = []
    clear_leftovers(out)
    with Stop(out.resolve() / f".stop.{os.getpid()}.tmp") as stop:
        for number, named in enumerate(configurations, 1):
            say(f"[{number}/{len(configurations)}] {named.name}")
            arguments = (str(dataset.path), str(out / named.name), named, device, workers, progress, stop.file)
            rows.append(_in_a_process(arguments, stop))
            if stop.asked:
                raise Stopped(f"{out / named.name}: stopped when measured", stop.status)
    try:
        write_json(out / "results.json", {"data": dataset.fingerprint, "rows": [_plain(row) for row in rows]})
        write_report(out / "report.html", rows, facts_of(dataset))
    except OSError as error:
        raise DataError(f"{out}: the report cannot be written ({error}); run again: what is trained stays") from error
    return rows


def _in_a_process(arguments: tuple[Any, ...], stop: Stop) -> Row:
    """Measure in a fresh process; pass requests to stop on to it."""
    run_path = arguments[1]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, *arguments).result()
        except BrokenProcessPool as error:
            if stop.asked:  # it went to that process, too, which was not training
                raise Stopped(f"{run_path}: stopped", stop.status) from error
            raise ModelError(f"{run_path}: its process was killed, perhaps for want of memory; run again") from error
        except Stopped as stopped:
            if stop.is_urgent:
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
            raise Stopped(stopped.where, stop.status if stop.asked else stopped.status) from None


def _measure(
    data: str, run_path: str, named: Named, device: str, workers: int | None, progress: bool, stop: Path | None = None
) -> Row:
    """Train one configuration and measure it on the test split."""
    dataset = Dataset.open(data)
    model = train(named.config, dataset, run_path, device=device, workers=workers, resume=True, progress=progress, stop=stop)
    run = Run.open(run_path)
    finished = run.records()
    records = [finished[r] for r in model.table.repetitions]  # the folder may hold more
    second = reranker_record(run.path) or {"train_s": 0.0, "parameters": 0, "bytes": 0, "peak_bytes": 0}
    trained = [*records, second]
    metrics, predict_s, decode_s = measure(model, dataset)
    return Row(
        name=named.name,
        config=run.config.to_dict() | {"buckets": run.sizes.n_buckets, "repetitions": len(records), "hidden": run.sizes.hidden},
        metrics=metrics,
        train_s=sum(record["train_s"] for record in trained),
        parameters=sum(record["parameters"] for record in trained),
        bytes=sum(record["bytes"] for record in trained),
        predict_s=predict_s,
        decode_s=decode_s,
        n_test=dataset.split(SPLIT).n_samples,
        peak_bytes=max(record["peak_bytes"] for record in trained),
        predicted_bytes=_predicted_bytes(run, dataset, [len(record["group"]) for record in records], devices_of(device)[0]),
        parts_s=_sums([*(record.get("parts_s", {}) for record in records), {"rerank": second["train_s"]}]),
        by_repetitions=by_repetitions(model, dataset),
    )


def _predicted_bytes(run: Run, dataset: Dataset, groups: Sequence[int], device: str) -> int:
    """Give what groups of such sizes, and the second stage after them, were expected to take at most."""
    second = second_stage(run.config, run.sizes, Samples.of(dataset))
    trained = max(group_bytes(run.config, run.sizes, n, device=torch.device(device)) for n in groups)
    return trained if second is None else max(trained, second.peak_bytes)


def _sums(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for figures in each for name in figures)
    return {name: round(sum(figures.get(name, 0.0) for figures in each), 6) for name in names}


def measure(model: Model, dataset: Dataset) -> tuple[dict[str, float], float, float]:
    """Give every metric of the test split, the seconds from features to top-k, and of these the seconds of decoding."""
    split, k = dataset.split(SPLIT), min(TOP_K, dataset.n_labels)
    evaluator, clock, start = evaluator_for(dataset), Clock(), 0
    model.predict_topk(_first_rows(split.features), k)  # warm: kernels compiled, weights mapped
    is_full, depth = model.table.is_identity, model.n_decoded(k)
    for features in model.full_chunks(split.features) if is_full else model.row_chunks(split.features):
        clock.start()
        if is_full:
            top = model.full_topk(features, depth, lap=clock.lap)
        else:
            logits = model.bucket_logits(features)
            clock.lap("outputs")
            top = decode_topk(logits, model.table, depth, loss=model.config.loss, estimator=DEFAULT_ESTIMATOR)
            clock.lap("decode")
        top = model.reranked(features, top, k)
        clock.lap("rerank")
        evaluator.update(top.labels, top.scores, _rows_of(split.labels, start, len(features)))
        start += len(features)
    seconds = clock.read()
    return evaluator.result(), sum(seconds.values()), seconds.get("decode", 0.0)


def by_repetitions(model: Model, dataset: Dataset) -> list[tuple[int, dict[str, float]]]:
    """Give the metrics when only the first 1, 2, 4, ... repetitions are decoded with; nothing for a single repetition."""
    R = len(model.repetitions)
    numbers = sorted({2**i for i in range(R.bit_length())} | {R}) if R > 1 else []
    evaluators = {n: evaluator_for(dataset) for n in numbers}
    split, k, start = dataset.split(SPLIT), min(5, dataset.n_labels), 0
    depth = model.n_decoded(k)
    for features in model.row_chunks(split.features) if numbers else ():
        logits = model.bucket_logits(features)
        truth = _rows_of(split.labels, start, len(features))
        for n, evaluator in evaluators.items():
            part = model.select(model.table.repetitions[:n])
            top = decode_topk(logits[:, :n].copy(), part.table, depth, loss=model.config.loss, estimator=DEFAULT_ESTIMATOR)
            evaluator.update(part.reranked(features, top, k).labels, None, truth)
        start += len(features)
    return [(n, evaluator.result()) for n, evaluator in evaluators.items()]


def facts_of(dataset: Dataset) -> Facts:
    """Give what a report says of the data."""
    labels = dataset.split("train").labels
    return Facts(
        name=dataset.path.resolve().name,
        n_train=len(labels),
        n_test=dataset.split(SPLIT).n_samples,
        n_features=dataset.n_features,
        n_labels=dataset.n_labels,
        labels_a_point=labels.nnz / max(1, len(labels)),
    )


def _first_rows(features: Any) -> Any:
    return features[:8] if not isinstance(features, CSR) else _rows_of(features, 0, min(8, len(features)))


def _rows_of(csr: CSR, start: int, n: int) -> CSR:
    return take_rows(csr, range(start, start + n))


def _plain(row: Row) -> Mapping[str, Any]:
    """Give a row as JSON values."""
    fields = {name: getattr(row, name) for name in Row.__slots__}
    plain: dict[str, Any] = json.loads(json.dumps(fields))
    return plain
