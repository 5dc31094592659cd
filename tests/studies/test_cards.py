"""Which notebook has which GPU: one each while there are as many, by turns where not; and what is compared with which memory."""

import contextlib
import threading
from pathlib import Path

import pytest
import torch

from t2ilib.config import ConfigError
from t2ilib.memory import GIB
from t2ilib.planning import fit
from t2ilib.studies import cards, executor, study, where
from t2ilib.studies.cards import VISIBLE, parse_listing, sharing, tell_sharing, visible_cards
from t2ilib.studies.executor import Executor
from t2ilib.studies.place import Demand, Place
from t2ilib.studies.runs import StudyRun
from t2ilib.studies.where import open_place

LISTING = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-aaaa)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-22222222-bbbb)
  MIG 3g.20gb     Device  0: (UUID: MIG-33333333-cccc)
  MIG 3g.20gb     Device  1: (UUID: MIG-44444444-dddd)
GPU 2: Tesla T4 (UUID: GPU-55555555-eeee)
"""


def test_the_drivers_list_is_read_and_divided_cards_are_their_parts() -> None:
    assert parse_listing(LISTING) == [
        "GPU-11111111-aaaa",
        "MIG-33333333-cccc",
        "MIG-44444444-dddd",
        "GPU-55555555-eeee",
    ]
    assert parse_listing("No devices found.\n") == []


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("0,2", ["0", "2"]),
        (" 1 , GPU-11111111-aaaa", ["1", "GPU-11111111-aaaa"]),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["0"]),  # CUDA stops at the first that is none
        ("NoDevFiles", []),
    ],
)
def test_what_the_user_made_visible_is_respected(said: str, found: list[str], monkeypatch) -> None:
    monkeypatch.setattr(cards, "list_cards", lambda: LISTING)
    assert visible_cards({VISIBLE: said}) == found
    assert len(visible_cards({})) == 4


def test_without_a_driver_there_is_no_card(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert visible_cards({}) == []


@pytest.mark.parametrize(
    ("jobs", "few", "most"), [(1, ["a"], 1), (2, ["a", "b", "c"], 1), (3, ["a", "b"], 2), (4, ["a"], 4)]
)
def test_how_many_share_a_card_is_told(jobs: int, few: list[str], most: int) -> None:
    assert sharing(jobs, few) == most
    said = tell_sharing(jobs, few)
    assert ("share" in said) == (most > 1)
    assert (said == "") == (jobs == 1)
    assert sharing(jobs, []) == jobs, "without a GPU they share the machine"
    assert tell_sharing(jobs, []) == ""


@pytest.mark.parametrize(
    ("few", "expected"), [(["a", "b"], ["a", "a", "b"]), (["a", "b", "c", "d"], ["a", "b", "c"]), ([], [None] * 3)]
)
def test_notebooks_that_run_at_a_time_have_cards_by_turns(
    tmp_path: Path, monkeypatch, few: list[str], expected: list
) -> None:
    """Six runs, three at a time: each wave waits for its three, so what they see is seen by all at once."""
    wave, seen = threading.Barrier(3, timeout=60), []

    def execute(notebook, output, parameters, variables, *_) -> tuple[int, str]:
        seen.append(variables.get(VISIBLE))
        wave.wait()
        return 1, "RuntimeError: made to fail"

    monkeypatch.setattr(StudyRun, "parameters", lambda self, parent: {})
    runs = [StudyRun(f"v{n}", 0, {}, tmp_path / f"v{n}", tmp_path / "x.ipynb", {"study": "toy"}) for n in range(6)]
    Executor(runs, Place(3, execute, where.ask_here, 1, few), "parent", "uri", lambda line: None).run()
    assert all((run.folder / "failed.txt").read_text().startswith("exit code 1") for run in runs)
    for number in (0, 3):
        assert sorted(seen[number : number + 3], key=str) == expected


@pytest.mark.parametrize("on", ["here", "ray"])
@pytest.mark.parametrize(
    ("few", "jobs", "runs", "per_card", "refused"),
    [
        (
            ["a"],
            2,
            9,
            1,
            "--jobs 2: this machine's GPU takes 1 notebook at a time, which makes 1. Take --jobs 1, or say --per-card 2 ",
        ),
        (
            ["a", "b"],
            5,
            9,
            2,
            "each of this machine's 2 GPUs takes 2 notebooks at a time, which makes 4. .* or say --per-card 3 ",
        ),
        (["a", "b"], 2, 9, 1, ""),
        (["a", "b"], 4, 9, 2, ""),
        (["a"], 3, 1, 1, ""),  # there is but one run
        (["a"], None, 9, 1, ""),
        ([], 3, 9, 1, ""),
    ],
)
def test_a_gpu_is_shared_only_if_that_is_asked_for(
    few: list[str], jobs: int | None, runs: int, per_card: int, refused: str, on: str, monkeypatch
) -> None:
    monkeypatch.setattr(where, "visible_cards", lambda: few)
    monkeypatch.setattr(where, "on_own_cluster", lambda jobs, cards, demand: contextlib.nullcontext())
    demand = Demand(runs, jobs, per_card, "sqlite:///x", print)
    if refused:
        with pytest.raises(ConfigError, match=refused), open_place(on, demand):
            pass
    else:
        with open_place(on, demand) as place:
            if on == "here":
                assert (place.jobs, place.cards) == (jobs or 1, few)


def test_a_variant_is_held_against_the_smallest_card_and_those_that_share_it(monkeypatch) -> None:
    free, asked = {0: 40 * GIB, 1: 10 * GIB}, []
    monkeypatch.setenv(VISIBLE, "0,1,2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free[card], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: asked.append(card))
    monkeypatch.setattr(fit, "misfits", lambda runs, sharing: asked.append(sharing) or [])
    study.misfits_of([], 3, ["0", "1"])
    assert asked == [1, 2]
    study.misfits_of([], 2, ["0", "1", "2"])
    assert asked[2:] == [1, 1]
    assert study.os.environ[VISIBLE] == "0,1", "the third card is not used by two notebooks"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    study.misfits_of([], 3, ["0", "1"])
    assert asked[-1] == 3, "cards that torch cannot use are no cards"


def test_kernels_share_the_cores_and_only_those_that_share_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "usable_cores", lambda: 5)
    monkeypatch.delenv(executor.THREADS, raising=False)
    several, alone = (
        Executor([], Place(jobs, where.execute_notebook, where.ask_here, jobs), "parent", "uri", print).variables()
        for jobs in (2, 1)
    )
    assert (several["OMP_NUM_THREADS"], several["OMP_WAIT_POLICY"]) == ("2", "passive")
    assert alone["OMP_NUM_THREADS"] == "5"
    assert "OMP_WAIT_POLICY" not in alone


@pytest.mark.parametrize(("told", "threads"), [("1", "1"), ("3", "2"), ("0", "2"), ("4,2", "2")])
def test_a_study_that_was_told_its_threads_gives_a_kernel_no_more(
    monkeypatch: pytest.MonkeyPatch, told: str, threads: str
) -> None:
    monkeypatch.setattr(executor, "usable_cores", lambda: 5)
    monkeypatch.setenv(executor.THREADS, told)
    two = Executor([], Place(2, where.execute_notebook, where.ask_here, 2), "parent", "uri", print)
    assert two.variables()[executor.THREADS] == threads
