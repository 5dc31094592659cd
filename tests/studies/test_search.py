"""What is searched: ranges that RunConfig has and takes, grids from end to end, and the next trial from those before, by hand."""

import itertools

import pytest
from pydantic import ValidationError

from t2ilib.studies.search import Searched, class_of, grid, kind_of, partial, refused_ends, search_of, wrong_names
from t2ilib.studies.trying import Tried, at_end, best_of, extension, next_trial

RATE = "optimizer.learning_rate"
LOG = {RATE: Searched(low=1e-4, high=1e-2, log=True)}
SETTINGS = {"adapter": {"rank": 4}, "optimizer": {"learning_rate": 3e-3}}


def tried(*pairs, **told) -> list[Tried]:
    """Trials of these (rate, gain); None diverged."""
    return [
        Tried(number, "diverged" if gain is None else "scored", {RATE: rate}, gain, **told)
        for number, (rate, gain) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"low": 1}, "give low and high, or choices"),
        ({"low": 2, "high": 1}, "low 2 must be below high 1"),
        ({"low": 0, "high": 1, "log": True}, "low must be above 0"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "has no step"),
        ({"low": 1, "high": 2, "choices": [1, 2]}, "choices stand alone"),
        ({"choices": [1, 1]}, "two different ones"),
        ({"lo": 1, "high": 2}, "Extra inputs"),
    ],
)
def test_ranges_that_are_none(told: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Searched(**told)


def test_names_are_those_of_a_run_config() -> None:
    span = Searched(low=0.1, high=0.2)

    def told(name: str) -> str:
        return " ".join(wrong_names({name: span}, "search"))

    assert "no such field; optimizer has betas, learning_rate" in told("optimizer.learning_rat")
    assert "Did you mean 'learning_rate'?" in told("optimizer.learning_rat")
    assert "It is a field of optimizer." in told("training.learning_rate")
    assert "Did you mean 'optimizer'?" in told("optimiser.learning_rate")
    assert "write section.field" in told("learning_rate")
    assert "how a run is judged" in told("evaluation.guidance_scale")
    assert not told(RATE)


def test_ends_that_a_run_refuses_are_told() -> None:
    def told(name: str, **field) -> list[str]:
        return list(refused_ends({name: Searched(**field)}, "search", SETTINGS))

    assert told(RATE, low=1e-4, high=1e-2) == []
    assert (
        "search.adapter.dropout: 1.0 is refused: Input should be less than 1"
        in told("adapter.dropout", low=0, high=1)[0]
    )
    assert "2.5 is refused" in told("adapter.rank", low=2.5, high=8)[0]
    assert "'dorra' does not exist" in told("adapter.kind", choices=["lora", "dorra"])[0]
    assert told("adapter.kind", low=1, high=2) == ["search.adapter.kind: it is no number: give choices"]
    assert told("adapter.targets", choices=["attention", ["to_q", "to_k"]]) == []


def test_whole_numbers_are_known_from_the_config() -> None:
    assert (kind_of("adapter.rank"), kind_of("optimizer.weight_decay"), kind_of("optimizer.name")) == (int, float, None)
    assert (kind_of("objective.snr_gamma"), kind_of("adapter.text_encoder_rank")) == (float, int)


def test_a_grid_goes_from_end_to_end_by_ratios_and_all_else_stands() -> None:
    search = {"adapter.dropout": Searched(choices=[0.0, 0.1]), **LOG, "adapter.rank": Searched(low=2, high=16)}
    points = grid(search, SETTINGS)
    rates = [point[RATE] for point in points]
    assert (rates[0], rates[-1]) == (1e-4, 1e-2)
    ratios = [b / a for a, b in itertools.pairwise(rates)]
    assert ratios == pytest.approx([10**0.5] * 4, rel=0.01)
    assert {(point["adapter.dropout"], point["adapter.rank"]) for point in points} == {(0.0, 4)}
    assert [p["adapter.rank"] for p in grid({"adapter.rank": Searched(low=2, high=16)}, SETTINGS)] == [2, 6, 9, 12, 16]
    stepped = {"adapter.rank": Searched(low=4, high=12, step=4)}
    assert [p["adapter.rank"] for p in grid(stepped, SETTINGS)] == [4, 8, 12]
    assert [p["adapter.kind"] for p in grid({"adapter.kind": Searched(choices=["lora", "dora"])}, SETTINGS)] == [
        "lora",
        "dora",
    ]
    assert grid({}, SETTINGS) == [{}]


def test_what_tunes_itself_has_no_rate_to_search() -> None:
    prodigy = {"optimizer": {"name": "prodigy"}}
    both = LOG | {"adapter.dropout": Searched(choices=[0.0, 0.1])}
    assert list(search_of(None, both, prodigy)) == ["adapter.dropout"]
    assert search_of(LOG, {}, prodigy) == LOG, "its own search is the user's word"
    assert search_of({}, both, {}) == {}
    assert search_of(None, both, {"training": {"trains": "nothing"}}) == {}
    assert [class_of(LOG, {}), class_of({}, {}), class_of({}, prodigy)] == ["tuned", "as it is", "tunes itself"]
    assert partial({RATE: 1, "adapter.rank": 2}) == {"optimizer": {"learning_rate": 1}, "adapter": {"rank": 2}}


def test_the_best_trial_and_whether_it_lies_at_an_end() -> None:
    inside = tried((1e-4, 0.1), (1e-3, 0.5), (1e-2, 0.2))
    assert best_of(inside).number == 1
    assert at_end(inside, LOG) == {}
    assert at_end(tried((1e-4, 0.5), (1e-3, 0.1)), LOG) == {RATE: "low"}
    assert at_end(tried((1e-4, 0.1), (1e-3, 0.5)), LOG) == {RATE: "high"}
    assert at_end(tried((1e-4, 0.1), (1e-3, 0.5), (1e-2, None)), LOG) == {}, "what diverged is the far side of the U"
    assert best_of(tried((1e-4, None))) is None
    level = tried((1e-4, 0.5), (1e-2, 0.5), (1e-3, 0.5))
    assert best_of(level).values[RATE] == 1e-3, "the middle of those that are as good"


def test_ranges_are_extended_where_the_best_lies_at_their_end() -> None:
    high, low = tried((1e-3, 0.1), (1e-2, 0.5)), tried((1e-4, 0.5), (1e-3, 0.1))
    assert extension(high, LOG, lambda values: True) == {RATE: 0.03}
    assert extension(low, LOG, lambda values: True) == {RATE: 3.33e-5}
    assert extension(high, LOG, lambda values: values[RATE] < 0.02) is None
    share = {"adapter.dropout": Searched(low=0, high=0.4)}
    dropped = [Tried(i, "scored", {"adapter.dropout": v}, -v) for i, v in enumerate((0.0, 0.2, 0.4))]
    assert at_end(dropped, share) == {"adapter.dropout": "low"}
    assert at_end(dropped, share, lambda values: values["adapter.dropout"] >= 0) == {}, "nothing lies below"
    linear = {RATE: Searched(low=1e-4, high=1e-2)}
    assert extension(high, linear, lambda values: True) is None


def simulate(
    best: float, trials: int, hours: float | None, extensions: int, seconds: float = 0.0
) -> tuple[list[float], str]:
    """A search of which every trial is scored by how far its rate is from `best`; the sampler asks for 2e-3."""
    done: list[Tried] = []
    while True:
        step = next_trial(done, LOG, grid(LOG, SETTINGS), trials, hours, extensions, lambda values: True)
        if step.why:
            return [t.values[RATE] for t in done], step.why
        assert not step.waits
        values = step.fixed or {RATE: 2e-3}
        gain = -abs(values[RATE] / best - 1) if values[RATE] > best else -abs(best / values[RATE] - 1)
        done.append(Tried(len(done), "scored", values, gain, step.extends, seconds=seconds))


def test_a_search_from_its_grid_to_its_end() -> None:
    assert simulate(1e-3, 8, None, 4) == (
        [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 2e-3, 2e-3, 2e-3],
        "its 8 trials are made",
    )
    rates, why = simulate(0.1, 6, None, 4)
    assert rates[5:] == [0.03, 0.09, 0.27]
    assert why == "its 6 trials are made, and 2 more because the best lay at an end"
    rates, why = simulate(100.0, 6, None, 2)
    assert rates[5:] == [0.03, 0.09], "no further than was said"
    assert len(simulate(1e-3, 8, 1.0, 4, seconds=600)[0]) == 6
    assert len(simulate(1e-3, 8, 1.0, 4, seconds=3000)[0]) == 5, "the grid is made in any case"
    assert simulate(1e-3, 8, 1.0, 4, seconds=600)[1] == "its 1 h are spent"


def test_a_search_waits_for_its_grid() -> None:
    points = grid(LOG, SETTINGS)
    begun = [Tried(i, "running", point) for i, point in enumerate(points)]
    assert next_trial(begun, LOG, points, 8, None, 4, lambda values: True).waits
    one = next_trial([], {}, [{}], 8, None, 4, lambda values: True)
    assert one.fixed == {}
    over = next_trial([Tried(0, "scored", {}, 1.0)], {}, [{}], 8, None, 4, lambda values: True)
    assert over.why == "there is nothing to search"
