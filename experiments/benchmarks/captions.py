"""How fast adverbs are taken out of captions: captions a second, beside TextBlob's tagging of the same captions in the same run.

    python experiments/benchmarks/captions.py [--count 200000]

The captions are new sentences, none twice, made of the beginnings and ends of the labelled ones in tests/data/adverbs.jsonl; a cache of
whole captions would help nobody. TextBlob only tags them, one by one, and takes nothing out. Where other work shares the processors, read
the ratios, not the numbers.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from t2ilib.data.captions import build_captions
from t2ilib.seeds import numpy_generator_for

LABELLED = Path(__file__).parents[2] / "tests" / "data" / "adverbs.jsonl"


def make_captions(count: int, seed: int = 0) -> list[str]:
    """So many distinct sentences, as long as those that they are made of."""
    words = [json.loads(line)["caption"].split() for line in LABELLED.read_text().splitlines()]
    rng = numpy_generator_for(seed, "benchmark captions")
    made: dict[str, None] = {}
    while len(made) < count:
        first, second = (words[i] for i in rng.integers(len(words), size=2))
        cut = int(rng.integers(2, len(first)))
        made[" ".join(first[:cut] + second[max(0, cut - 1) :])] = None
    return list(made)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of processors: of this process."""
    start, times = time.perf_counter(), os.times()
    work()
    return time.perf_counter() - start, sum(os.times()[:2]) - sum(times[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3, help="The fastest of so many is shown; the two take turns.")
    chosen = parser.parse_args()
    from textblob.en.taggers import PatternTagger

    captions = make_captions(chosen.count)
    pictures = [(caption,) for caption in captions]
    transforms, tagger = build_captions(["drop_adverbs"]), PatternTagger()
    transforms.edit(pictures[0]), tagger.tag(captions[0])  # what is read at first use is read
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    length = np.mean([len(caption.split()) for caption in captions])
    print(f"{chosen.count:,} captions of {length:.1f} words, {processors} processors, load {os.getloadavg()[0]:.1f}")
    rows: dict[str, Callable[[], object]] = {
        "TextBlob, tagging alone": lambda: [tagger.tag(caption) for caption in captions],
        "drop_adverbs": lambda: transforms.edit_all(pictures),
    }
    rounds = [{name: seconds(work) for name, work in rows.items()} for _ in range(chosen.rounds)]
    fastest = {name: tuple(min(taken[name][i] for taken in rounds) for i in range(2)) for name in rows}
    clock, processor = next(iter(fastest.values()))
    print(f"{'':>28}  captions/s  x TextBlob  captions/s of processor time  x TextBlob")
    for name, (took, worked) in fastest.items():
        left = f"{name:>28}  {chosen.count / took:>10,.0f}  {clock / took:>10.2f}"
        print(f"{left}  {chosen.count / worked:>28,.0f}  {processor / worked:>10.2f}")


if __name__ == "__main__":
    main()
