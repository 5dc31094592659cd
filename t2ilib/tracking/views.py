"""Views of MLflow's runs page that are ready when a study is: which runs, columns and charts, in which order.

MLflow's UI keeps what a person has arranged in their browser, and what they share as a tag of the experiment, which an address names
(MLflow 3.17, `viewStateShareKey`). Such a tag is written here, so that an address opens the runs of a study side by side: without their
parent, which would hide them, what differs between variants as the first columns, sample grids as the first chart. Fields that are not
named are the UI's defaults. Leaves out which runs are unfolded or hidden: the UI takes those from no shared view.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from t2ilib.tracking.naming import FIRST, FIRST_METRICS, shown_name

SHARED = "mlflow.sharedViewState."
RUNS = "-runs"
"""What the keys of views of single runs end with; of means over seeds there is another."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment by which the UI opens it as training, not as GenAI."""
TRAINING = "workflowType=machine_learning"
"""Of an address: the UI's menu of training, not of GenAI."""
SAMPLES = "samples"
"""Key of the image series of sample grids."""
TABLE = ("held_out_loss", "world/all", "concept/all", "base_kept/all", "clip_score/prompts", "steps_per_second")
"""Metrics that have a column."""
CURVES = ("loss", "held_out_loss")
"""Of FIRST_METRICS, those that have a value at many steps; of the others one bar a run says all."""
REST = ("Model metrics", "System metrics")
"""Sections that the UI always has."""


def view_address(experiment_id: str, key: str, charts: bool = True) -> str:
    """What follows a server's address, from `#`."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={key}{mode}&{TRAINING}"


def view_tag(key: str, state: Mapping[str, Any]) -> dict[str, str]:
    """The tag that holds a view, packed as the UI packs it: a tag's value has a limit."""
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return {f"{SHARED}{key}": f"deflate;{packed}"}


def study_view(
    parent: str, columns: Sequence[str], metrics: Sequence[str], steps: int, grouped: bool = False
) -> dict[str, Any]:
    """The state of the runs page for the children of `parent`.

    `columns`: fields of RunConfig that differ; `metrics`: names in MLflow that the runs have, whose sections stand folded below the first; `steps`: of the grids that are shown first;
    `grouped`: one curve a variant, the mean of its seeds, for which the UI shows no pictures.
    """
    first = [name for name in map(shown_name, FIRST_METRICS) if not metrics or name in metrics]
    others = [name for name in metrics if name not in first]
    sections = {FIRST: True} | dict.fromkeys([*sorted({section_of(name) for name in others} - {*REST}), *REST], False)
    charts = ([] if grouped else [picture_chart(steps)]) + [metric_chart(name) for name in first]
    shown = [f"tags.`{name}`" for name in ("variant", "seed")] + [f"params.`{name}`" for name in columns]
    shown += [f"metrics.`{name}`" for name in map(shown_name, TABLE) if name in first]
    state: dict[str, Any] = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'",
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "selectedColumns": shown,
        "columnOrder": shown,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": [
            {"uuid": uuid_of(name), "name": name, "display": shown, "isReordered": True, "deleted": False}
            for name, shown in sections.items()
        ],
        "compareRunCharts": charts,
        "isAccordionReordered": True,
    }
    if grouped:
        state["groupBy"] = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "variant"}]}
    return state


def picture_chart(step: int) -> dict[str, Any]:
    return chart(SAMPLES, "IMAGE", FIRST) | {"imageKeys": [SAMPLES], "step": step, "showRunParams": False}


def metric_chart(name: str) -> dict[str, Any]:
    short = name.rpartition("/")[2]
    about = {"metricKey": name, "displayName": short}
    if short not in CURVES:
        return chart(name, "BAR", FIRST) | about
    line = {"xAxisKey": "step", "scaleType": "linear", "lineSmoothness": 0, "range": {}, "useGlobalXaxisKey": True}
    return chart(name, "LINE", FIRST) | about | line | {"useGlobalLineSmoothing": True}


def chart(name: str, kind: str, section: str) -> dict[str, Any]:
    """Not marked as generated: those the UI makes anew, as lines of one point."""
    own = {"uuid": uuid_of(f"chart {name}"), "type": kind, "metricSectionId": uuid_of(section)}
    return own | {"runsCountToCompare": 100, "deleted": False, "isGenerated": False}


def section_of(name: str) -> str:
    """The section of the charts that a metric stands in: what is before its last slash."""
    section = name.rpartition("/")[0]
    return REST[1] if section == "system" else section or REST[0]


def uuid_of(name: str) -> str:
    return f"t2ilib {name}"
