"""Prior preservation before a base is loaded: prompts, which samples a step sees, what they weigh, what is told of the user's pictures."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from t2ilib.config import ConfigError
from t2ilib.data.cache import EncodedDataset
from t2ilib.data.dataset import load_datasets, manifest_rows, summary
from t2ilib.data.loader import Order
from t2ilib.data.prior import build_order, expand, given_pictures, joined, loss_terms, loss_weights, num_class
from t2ilib.data.samples import Samples
from t2ilib.runfile import build_run
from t2ilib.shapes import world
from t2ilib.studies.file import load_study

STUDY = Path(__file__).parents[2] / "experiments" / "adapters.yaml"
PATTERNS = ("a {red|green} circle", "a blue square")


def run_of(prior, batch_size=4, **data):
    values = {"adapter": {}, "data": data, "training": {"batch_size": batch_size}}
    return build_run(values | {"prior": {"prompts": PATTERNS} | prior})


class TestPrompts:
    def test_all_in_turn_and_every_choice_comes(self):
        found = expand(PATTERNS, 40)
        assert found[1::2] == ["a blue square"] * 20
        assert set(found[::2]) == {"a red circle", "a green circle"}
        assert expand(PATTERNS, 7) == found[:7]

    def test_braces_in_braces_and_choices_of_nothing(self):
        found = set(expand(("a {|very {small|large} }circle {at the {top|center}|alone}",), 200))
        sizes, places = ("", "very small ", "very large "), ("at the top", "at the center", "alone")
        assert found == {f"a {size}circle {place}" for size in sizes for place in places}

    @pytest.mark.parametrize(
        ("prompt", "told"),
        [("a {red|green circle", "brace without its partner"), ("a red} circle", "brace"), ("{|}", "may say nothing")],
    )
    def test_mistakes(self, prompt, told):
        with pytest.raises(ConfigError, match=f"prior.prompts: .*{told}"):
            given_pictures(run_of({"prompts": ["a circle", prompt]}))

    def test_those_of_the_adapters_study_are_captions_of_its_world_and_none_is_tested(self):
        settings = load_study(STUDY).settings("prior", "concepts_and_prior")
        scenes = {world.caption(scene, phrasing): scene for scene in world.all_scenes() for phrasing in range(4)}
        found = expand(tuple(settings["prior"]["prompts"]), settings["prior"]["num_pictures"])
        assert set(found) <= scenes.keys()
        assert {scenes[text].shape for text in found} == set(world.SHAPES)
        tested = world.mixed_scenes(settings["shapes"]["checked_prompts"], "test", 0, ["base"])
        assert not {scenes[text] for text in found} & {*tested}


class TestOrder:
    def test_whole_shares_are_in_every_batch_and_epochs_are_their_own(self):
        order = Order(0, 8, 12 + 9, None, 9, 0.25)
        batches = [order(step) for step in range(8)]
        assert all(len(set(batch)) == 8 and sum(i >= 12 for i in batch) == 2 for batch in batches)
        for start in (0, 2, 4, 6):  # 6 of 12 a step
            assert {i for batch in batches[start : start + 2] for i in batch if i < 12} == set(range(12))
        for start in (0, 4):  # 2 of 9 a step, one is left over
            assert len({i for batch in batches[start : start + 4] for i in batch if i >= 12}) == 8
        assert [order(step) for step in reversed(range(8))] == batches[::-1]
        assert [Order(1, 8, 21, None, 9, 0.25)(step) for step in range(8)] != batches

    @pytest.mark.parametrize(("batch_size", "share"), [(1, 0.5), (1, 0.1), (3, 0.5), (4, 0.3), (2, 0.9)])
    def test_other_shares_are_spread_evenly_over_the_steps(self, batch_size, share):
        order = Order(0, batch_size, 10 + 7, None, 7, share)
        batches = [order(step) for step in range(200)]
        of_class = np.cumsum([sum(i >= 10 for i in batch) for batch in batches])
        seen = batch_size * np.arange(1, 201)
        assert all(len(batch) == batch_size for batch in batches)
        assert (np.abs(of_class - share * seen) < 1).all()
        for part in (range(10), range(10, 17)):  # each as often as every other
            counts = Counter(i for batch in batches for i in batch if i in part)
            assert max(counts[i] for i in part) - min(counts[i] for i in part) <= 1
        assert [order(step) for step in reversed(range(200))] == batches[::-1]

    def test_samples_of_several_sizes_take_turns_by_batches(self):
        buckets = np.array([0] * 5 + [1] * 4 + [0] * 6)
        order = Order(0, 2, 15, buckets, 6, 0.25)
        batches = [order(step) for step in range(16)]
        kinds = [{i >= 9 for i in batch} for batch in batches]
        assert all(len(kind) == 1 for kind in kinds)
        assert kinds.count({True}) == 4
        assert all(len({buckets[i] for i in batch}) == 1 for batch in batches)
        assert {i for batch in batches for i in batch} == set(range(15))

    @pytest.mark.parametrize(
        ("sizes", "told"),
        [
            (
                (8, 5 + 2, None, 2, 0.5),
                "prior.share makes 4 of 8 samples pictures of the class, and there are 2: lower",
            ),
            ((8, 3 + 9, None, 9, 0.5), "of a batch of 8, 4 are one's own pictures .*, and there are 3: lower"),
            ((2, 5, np.array([0, 0, 0, 0, 1]), 1, 0.5), "is more than the 1 pictures of the class of any one size"),
            ((2, 5, np.array([0, 1, 2, 0, 0]), 2, 0.5), "is more than the 1 training pictures of any one size"),
        ],
    )
    def test_batches_that_cannot_be_filled(self, sizes, told):
        with pytest.raises(ConfigError, match=told):
            Order(0, *sizes)

    def test_few_pictures_of_ones_own_need_only_fill_their_share(self):
        run = run_of({"share": 0.5}, batch_size=8)
        assert len(build_order(run, 4, num_class(run, None))(0)) == 8


class TestLoss:
    def test_it_is_the_mean_of_ones_own_and_the_weight_times_that_of_the_class(self):
        """DreamBooth's loss, in every batch of whole shares, and over steps where they alternate."""
        losses = torch.tensor([1.0, 2.0, 4.0, 8.0])
        settings = run_of({"share": 0.25, "weight": 3.0}).prior
        own, of_class = loss_weights(settings)
        weighted = losses * torch.tensor([own, own, own, of_class])
        assert float(weighted.mean()) == pytest.approx(7 / 3 + 3 * 8)
        terms = loss_terms(settings, weighted, torch.tensor([False, False, False, True]))
        assert terms == pytest.approx({"loss/own": 7 / 3, "loss/class": 24})
        assert loss_terms(settings, weighted[:2], torch.tensor([False, False])) == pytest.approx({"loss/own": 1.5})
        alternating = run_of({"share": 0.5, "weight": 3.0}).prior
        own, of_class = loss_weights(alternating)
        assert (own * 5 + of_class * 7) / 2 == pytest.approx(5 + 3 * 7)

    def test_samples_weigh_what_their_part_and_they_themselves_weigh(self, both):
        run, training = both(share=0.2, weight=0.1, weights={"*": 0.5})
        samples = Samples(training, run.data, 0)

        def latents(views):
            return {"latents": torch.zeros(len(views), 4, 8, 8)}

        batch = EncodedDataset(samples, latents, None, loss_weights(run.prior)).batch([0, 3], 0, [False] * 2, "cpu")
        assert batch["weights"].tolist() == pytest.approx([0.5 / 0.8, 0.1 / 0.2])
        assert "weights" not in EncodedDataset(samples, latents, None).batch([3, 4], 0, [False] * 2, "cpu")


@pytest.fixture
def both(tmp_path, captioned, picture):
    """`both(**options)`: a run with three pictures of one's own and two of the class, and what it is trained on."""

    def make(path=None, share=0.5, weight=1.0, class_prompts=(), **data):
        own, of_class = captioned(tmp_path / "own", 3), path or captioned(tmp_path / "class", 2)
        for number in range(0 if path else 2):
            picture(50 + number).save(of_class / f"{number:03d}.png")
        prior = {"prompts": list(class_prompts), "path": str(of_class), "share": share, "weight": weight}
        run = run_of(prior, path=str(own), validation_share=0, **data)
        training, held_out = load_datasets(run)
        return run, joined(run, training, held_out, given_pictures(run))

    return make


class TestPicturesOfTheUsersOwn:
    def test_they_come_last_and_are_told_apart(self, both, caplog):
        caplog.set_level("INFO")
        run, training = both()
        assert (len(training), training.num_class, len(training.own)) == (5, 2, 3)
        assert num_class(run, given_pictures(run)) == 2
        assert [Path(str(record.path)).parent.name for record in training.records] == ["own"] * 3 + ["class"] * 2
        assert (
            "class: 2 pictures beside 3 of one's own, 0.5 of what steps see; their mean loss counts 1 times"
            in caplog.text
        )
        rows = [(row[0], Path(row[1]).parent.name) for row in manifest_rows(training, load_datasets(run)[1])]
        assert rows == [("training", "own")] * 3 + [("class", "class")] * 2

    def test_what_is_rejected_of_them_is_told_and_kept(self, both, tmp_path, captioned, caplog):
        """With the run, and apart from what is rejected of one's own."""
        classes = captioned(tmp_path / "class", 5)
        (classes / "000.png").write_bytes(b"half")
        with pytest.raises(ConfigError, match=r"prior.path: .*1 file cannot be used, 4 pictures can:\n  000.png"):
            both(path=classes)
        run, training = both(path=classes, max_rejected=0.5)
        assert "1 rejected:\n  000.png" in caplog.text
        rows = list(manifest_rows(training, load_datasets(run)[1]))
        assert [(row[0], Path(row[1]).name) for row in rows if row[0] == "rejected"] == [("rejected", "000.png")]
        assert training.rejected == ()
        told = summary(training, load_datasets(run)[1])
        assert told["pictures"] | {"hidden": 0} == {
            "training": 3,
            "class": 4,
            "held_out": 0,
            "rejected": 1,
            "left_aside": 0,
            "hidden": 0,
        }
        assert told["digest"].keys() == {"training", "class", "held_out"}
        assert told["digest"]["training"] == training.own.digest

    def test_a_folder_that_is_not_there(self, both, tmp_path):
        with pytest.raises(ConfigError, match=r"prior.path .*nowhere is not a folder"):
            both(path=tmp_path / "nowhere")

    def test_one_prompt_is_the_caption_of_those_that_have_none(self, both, tmp_path, captioned):
        classes = captioned(tmp_path / "bare", 3)
        (classes / "001.txt").unlink()
        _, training = both(path=classes, class_prompts=["a dog"])
        assert training.captions()[3:] == ["caption 0", "a dog", "caption 2"]
        with pytest.raises(
            ConfigError, match="beside path one prompt is the caption of pictures that have none, and there are 2"
        ):
            both(path=classes, class_prompts=["a dog", "a cat"])
        with pytest.raises(ConfigError, match="give path, a folder of pictures of the class, or prompts"):
            run_of({"prompts": []})

    def test_pictures_that_are_ones_own_too_are_warned_about(self, both, tmp_path, caplog):
        both(path=tmp_path / "own")
        assert "class: 3 pictures are also among the training pictures (000.png, ...)" in caplog.text

    @pytest.mark.parametrize("edit", ["shuffle_tags", {"template": "sks, {caption}"}])
    def test_edits_are_not_made_on_their_captions(self, both, edit):
        run, training = both(captions=[edit])
        samples = Samples(training, run.data, 0)
        assert [samples.caption(i, 0, 0) for i in (3, 4)] == ["caption 0", "caption 1"]
        assert training.own.edits is not None or "sks" in training.captions()[0]

    def test_buckets_are_filled_by_each_part_alone(self, both, tmp_path, picture):
        """One tall picture among square ones of the same part is cropped; a batch of them of the other part changes nothing."""
        own, classes = tmp_path / "own", tmp_path / "class"
        run, training = both(resolution=64, buckets=True)
        sizes = {own / "000.png": (40, 80), classes / "000.png": (40, 80), classes / "001.png": (40, 80)}
        for number, (path, size) in enumerate(sizes.items()):
            picture(90 + number, size).save(path)
        for path in (own / "001.png", own / "002.png"):
            picture(99, (64, 64)).save(path)
        run = run.model_copy(update={"training": run.training.model_copy(update={"batch_size": 2})})
        training, held_out = load_datasets(run)
        samples = Samples(joined(run, training, held_out, given_pictures(run)), run.data, 0, batch_size=2)
        assert samples.targets[:3].tolist() == [[64, 64]] * 3
        assert samples.num_moved == 1
        assert (samples.targets[3:, 0] > samples.targets[3:, 1]).all()
        order = build_order(run, 3, 2, samples.buckets)
        assert [{i >= 3 for i in order(step)} for step in range(4)] == [{False}, {True}] * 2
