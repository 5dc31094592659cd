"""A study's raw rows in one file, `rows.parquet`, from which its report is made again to the byte, without the runs' folders.

A row is one number of one run: `variant`, `seed`, `step`, `group`, `number` and `prompt` of the picture, `metric`, `value`.

| rows | step | group, number, prompt | |
|---|---|---|---|
| of a single picture | of the weights that drew it | set | |
| of a whole run | none | none | the numbers of its result |
| of a curve | set | none | of the metrics that a run declared; losses of single steps stay with the runs |
| pictures that the report shows | none | prompt | `picture`: a PNG; the metric is `picture`, without a value |

What is no number (the study's texts, settings, declarations, versions) stands as JSON in the file's metadata, under `t2ilib`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError
from t2ilib.evaluation.metrics import Metric, as_written
from t2ilib.evaluation.rows import Row
from t2ilib.report.contents import FinishedRun, StudyReport, read_variant

ROWS, KEY, PICTURE = "rows.parquet", b"t2ilib", "picture"
COLUMNS = ("variant", "seed", "step", "group", "number", "prompt", "metric", "value", PICTURE)
SHARED = ("settings", "environment", "declared")
"""What many runs say alike."""
PLAIN = ("name", "question", "preset", "reference", "base", "seeds", "missing", "not_run", "not_finite", "held_out", "outdated", "margins", "score", "beside")  # fmt: skip
"""Fields of a StudyReport that stand in the metadata as they are."""


def write_parquet(report: StudyReport, path: Path) -> Path:
    """Writes all rows of a study to `path`; another file is in its place only when it is whole."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = (pa.string(), pa.int64(), pa.int64(), pa.string(), pa.int64(), pa.string(), pa.string(), pa.float64(), pa.binary())  # fmt: skip
    told = {key: getattr(report, key) for key in PLAIN} | {
        "variants": {name: variant.model_dump(mode="json", by_alias=True) for name, variant in report.variants.items()},
        "metrics": {name: as_written(metric) for name, metric in report.metrics.items()},
    }
    told["runs"], told["shared"] = shared([about_run(run) for run in report.runs.values()])
    rows = list(rows_of(report))
    columns = [pa.array([row.get(name) for row in rows], kind) for name, kind in zip(COLUMNS, kinds, strict=True)]
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)), {KEY: json.dumps(told, ensure_ascii=False).encode()})
    draft = path.with_name(path.name + ".part")
    parquet.write_table(pa.Table.from_arrays(columns, schema=schema), draft, compression="zstd")
    draft.rename(path)
    return path


def about_run(run: FinishedRun) -> dict[str, Any]:
    own = ("variant", "seed", "seconds", "settings", "mlflow_run_id", "jobs", "environment")
    return {key: getattr(run, key) for key in own} | {
        "declared": {name: as_written(metric) for name, metric in run.declared.items()}
    }


def shared(runs: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The runs, with numbers in place of what many of them say alike, and what these numbers stand for: the metadata of a file is
    not compressed."""
    known: dict[str, int] = {}
    told = [
        run | {key: known.setdefault(json.dumps(run[key], sort_keys=False), len(known)) for key in SHARED}
        for run in runs
    ]
    return told, [json.loads(text) for text in known]


def rows_of(report: StudyReport) -> Iterator[dict[str, Any]]:
    for run in report.runs.values():
        of_run = {"variant": run.variant, "seed": run.seed}
        for name, value in run.metrics.items():
            yield of_run | {"metric": name, "value": value}
        for name, curve in run.history.items():
            for step, value in curve.items() if name in run.declared else ():
                yield of_run | {"step": step, "metric": name, "value": value}
        for row in run.rows:
            place = {key: value for key, value in vars(row).items() if key != "values"}
            for name, value in row.values.items():
                yield of_run | place | {"metric": name, "value": value}
        for prompt, picture in run.pictures.items():
            yield of_run | {"prompt": prompt, "metric": PICTURE, PICTURE: picture}


def read_parquet(path: Path) -> StudyReport:
    """The study that `write_parquet` wrote. Raises ConfigError for a file that is none."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        found = parquet.read_table(path)
        told = json.loads(found.schema.metadata[KEY])
    except (pa.ArrowInvalid, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is no file of a study's rows: {error}") from None
    numbers: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in found.to_pylist():
        numbers.setdefault((row["variant"], row["seed"]), []).append(row)
    whole = [about | {key: told["shared"][about[key]] for key in SHARED} for about in told["runs"]]
    runs = [read_run(path.parent, about, numbers.get((about["variant"], about["seed"]), [])) for about in whole]
    plain = {key: tuple(map(frozen, value)) if isinstance(value := told[key], list) else value for key in PLAIN}
    return StudyReport(
        folder=path.parent,
        variants={name: read_variant(name, about) for name, about in told["variants"].items()},
        runs={(run.variant, run.seed): run for run in runs},
        metrics=read_metrics(told["metrics"]),
        **plain,
    )


def frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_metrics(told: Mapping[str, Mapping[str, Any]]) -> dict[str, Metric]:
    return {name: Metric(**about) for name, about in told.items()}


def read_run(folder: Path, about: Mapping[str, Any], rows: list[dict[str, Any]]) -> FinishedRun:
    metrics, history, pictures = {}, {}, {}
    single: dict[tuple[int, str, int], dict[str, Any]] = {}
    for row in rows:
        name, value = row["metric"], row["value"]
        if row[PICTURE] is not None:
            pictures[row["prompt"]] = row[PICTURE]
        elif row["prompt"] is not None:
            place = {key: row[key] for key in ("step", "group", "number", "prompt")}
            single.setdefault((row["step"], row["group"], row["number"]), place | {"values": {}})["values"][name] = (
                value
            )
        elif row["step"] is not None:
            history.setdefault(name, {})[row["step"]] = value
        else:
            metrics[name] = value
    told = {key: value for key, value in about.items() if key != "declared"}
    return FinishedRun(
        folder=folder / about["variant"] / f"seed{about['seed']}",
        metrics=metrics,
        declared=read_metrics(about["declared"]),
        history=history,
        rows=tuple(Row(**row) for row in single.values()),
        pictures=pictures,
        **told,
    )
