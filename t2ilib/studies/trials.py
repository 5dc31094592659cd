"""The trials of one variant, kept by Optuna in a SQLite file, so that a search goes on after kill -9 with no trial lost or made twice.

A trial that was running when the search was killed is still "running" in the file: it is the same trial again, with the same values, in the
same folder, where its notebook resumes from its checkpoint. A value that had not been chosen yet is chosen then. Optuna's TPE (arXiv
2304.11127) chooses what the grid does not; its seed is a function of study, variant and trial, never of how often the search was begun.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError
from t2ilib.seeds import seed_for
from t2ilib.studies.search import GRID, Search, kind_of
from t2ilib.studies.trying import Tried
from t2ilib.tracking.store import sqlite_uri

STATES = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "scored", "PRUNED": "diverged", "FAIL": "given up"}
"""Optuna's state -> ours. TPE takes a trial that it calls pruned for a bad one, which one that diverged is, and looks away from one that
failed, of whose values nothing is known."""
ASKED, EXTENDS, FAILURES, SECONDS, FIXED = "asked", "extends", "failures", "seconds", "fixed_params"


def optuna():
    """The package, quiet; raises ConfigError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            '`study tune` searches by Optuna, which is not installed: pip install "t2ilib[tune]"'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_storage(file: Path):
    """Optuna's storage in a SQLite file, made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return optuna().storages.RDBStorage(sqlite_uri(file.absolute()), engine_kwargs={"connect_args": {"timeout": 60}})


class Trials:
    """The trials of one variant. `asked`: what is searched, of which settings, by which score; raises ConfigError where it was something
    else when the search began."""

    def __init__(self, storage, name: str, search: Search, asked: Mapping[str, Any]):
        self.optuna, self.name, self.search = optuna(), name, search
        self.study = self.optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True, sampler=self.sampler(0)
        )
        asked = json.loads(json.dumps(asked))
        before = self.study.user_attrs.get(ASKED)
        if before is None:
            self.study.set_user_attr(ASKED, asked)
        elif before != asked:
            changed = [key for key in asked if before.get(key) != asked[key]]
            raise ConfigError(
                f"{name} was searched with other {', '.join(changed)} than the study now says, so its trials are no answer to it: put"
                f" back what there was ({', '.join(f'{key}: {before.get(key)}' for key in changed)[:600]}), give the variant a new name, or"
                " delete the tuning folder"
            )

    def sampler(self, number: int):
        seed = seed_for(0, "tuning", self.name, number) % 2**32
        return self.optuna.samplers.TPESampler(seed=seed, n_startup_trials=GRID, constant_liar=True)

    def all(self) -> list[Tried]:
        return [self.told(trial) for trial in self.study.get_trials(deepcopy=False)]

    def told(self, trial) -> Tried:
        fixed = trial.system_attrs.get(FIXED, {})
        values = {name: self.read(name, value) for name, value in {**fixed, **trial.params}.items()}
        state = STATES[trial.state.name]
        return Tried(
            trial.number,
            state,
            values,
            trial.value if state == "scored" else None,
            bool(trial.user_attrs.get(EXTENDS)),
            trial.user_attrs.get(FAILURES, 0),
            trial.user_attrs.get(SECONDS, 0.0),
        )

    def begin(self, fixed: Mapping[str, Any] | None = None, extends: bool = False) -> Tried:
        """A new trial, of these values or of the sampler's."""
        if fixed is not None:
            written = {name: self.write(name, value) for name, value in fixed.items()}
            self.study.enqueue_trial(written, user_attrs={EXTENDS: extends})
        return self.resume(self.study.ask().number)

    def resume(self, number: int) -> Tried:
        """The trial of this number with all its values, those chosen that were not."""
        self.study.sampler = self.sampler(number)
        trial = self.live(number)
        for name, field in self.search.items():
            if field.choices:
                trial.suggest_categorical(name, [json.dumps(value) for value in field.choices])
                continue
            low, high = self.ends(name)
            if kind_of(name) is int:
                trial.suggest_int(name, int(low), int(high), step=int(field.step or 1), log=field.log)
            else:
                trial.suggest_float(name, low, high, step=field.step, log=field.log)
        return self.told(self.frozen(number))

    def ends(self, name: str) -> tuple[float, float]:
        """A range, extended as far as it was tried."""
        field = self.search[name]
        tried = [trial.values[name] for trial in self.all() if name in trial.values]
        return min([field.low, *tried]), max([field.high, *tried])

    def score(self, number: int, gain: float, seconds: float) -> None:
        self.set(number, SECONDS, seconds)
        self.study.tell(number, gain)

    def diverge(self, number: int, seconds: float) -> None:
        self.set(number, SECONDS, seconds)
        self.study.tell(number, state=self.optuna.trial.TrialState.PRUNED)

    def fail(self, number: int, patience: int) -> bool:
        """Notes a failure; after `patience` of them the trial is given up. Returns whether it is."""
        failures = self.told(self.frozen(number)).failures + 1
        self.set(number, FAILURES, failures)
        if failures >= patience:
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
        return failures >= patience

    def set(self, number: int, key: str, value: Any) -> None:
        self.live(number).set_user_attr(key, value)

    def live(self, number: int):
        """A trial of an earlier process or call, as `ask` gave it; Optuna's own number of it is known to no public name."""
        return self.optuna.Trial(self.study, self.frozen(number)._trial_id)

    def frozen(self, number: int):
        return self.study.get_trials(deepcopy=False)[number]

    def write(self, name: str, value: Any) -> Any:
        """A value as Optuna keeps it: of choices only plain ones, so all as JSON."""
        return json.dumps(value) if self.search[name].choices else value

    def read(self, name: str, value: Any) -> Any:
        if name in self.search and self.search[name].choices:
            with suppress(TypeError, json.JSONDecodeError):
                return json.loads(value)
        return value
