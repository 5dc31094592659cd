"""Groups of prompts for a study of one's own pictures: what was taught, alone, in new places, in other styles, and what has nothing to do
with it.

They are made of a trigger and a class word by templates and written into the study file, where they are the user's to change. The
unrelated ones are everyday subjects in plain words, spread over people, animals, places, things, food, weather and ways of showing
them, so that what a training damages has a chance to show; over a tiny base they are of the only world that it knows.
"""

from collections.abc import Sequence

from t2ilib.config import ConfigError
from t2ilib.shapes import world

NUM_UNRELATED = 50
ALONE = ("{it}", "a photo of {it}", "a picture of {it}", "a close-up of {it}")
CONTEXTS = (
    "{it} on a beach at sunset",
    "{it} in a snowy forest",
    "{it} on a kitchen table",
    "{it} in front of the Eiffel Tower",
    "{it} in a field of sunflowers",
    "{it} on a busy city street at night",
    "{it} in the desert under a blue sky",
    "{it} on a wooden boat on a lake",
)
STYLES = (
    "an oil painting of {it}",
    "a watercolor of {it}",
    "a pencil sketch of {it}",
    "{it} as a pixel art sprite",
)
UNRELATED = (
    "an old man reading a newspaper on a park bench",
    "a young woman laughing in the rain",
    "two children building a sandcastle",
    "a portrait of a firefighter in uniform",
    "a crowd at an open-air concert",
    "a cook slicing vegetables in a restaurant kitchen",
    "a cyclist climbing a mountain road",
    "hands playing an upright piano",
    "a grey cat asleep on a windowsill",
    "a horse galloping through shallow water",
    "a flock of sheep on a green hill",
    "an owl on a bare branch at dusk",
    "a shoal of tropical fish over a reef",
    "a bee on a lavender flower",
    "an elephant crossing a dry river",
    "a rooster in a farmyard",
    "a lighthouse on a rocky coast",
    "a narrow street in an old town",
    "a red barn in a wheat field",
    "a glass skyscraper seen from below",
    "a stone bridge over a stream",
    "the inside of a quiet library",
    "a railway station at rush hour",
    "a wooden cabin beside a frozen lake",
    "a waterfall in a green valley",
    "sand dunes in the evening light",
    "a birch forest in autumn",
    "a volcano under a clear night sky",
    "storm clouds over the open sea",
    "a rainbow above a ploughed field",
    "a full moon behind thin clouds",
    "fog in a valley at dawn",
    "a bowl of ramen with a boiled egg",
    "a stack of pancakes with berries",
    "a loaf of bread on a wooden board",
    "a basket of ripe tomatoes",
    "a cup of coffee beside a notebook",
    "a birthday cake with lit candles",
    "a yellow taxi in heavy traffic",
    "a steam locomotive crossing a viaduct",
    "a sailing boat near an island",
    "a small plane on a grass runway",
    "a rusty bicycle against a brick wall",
    "a blue vase with white tulips",
    "an armchair beside a fireplace",
    "a shelf full of old clocks",
    "a chessboard in the middle of a game",
    "a violin in an open case",
    "a map of an imaginary island",
    "a black and white photo of an empty road",
    "a child's crayon drawing of a house",
    "a poster of a rocket, flat colors",
    "an ink drawing of a bamboo grove",
    "an abstract painting of circles and lines",
)
SHAPES_ALONE = ("{it}", "a picture of {it}", "{it} on a white background", "{it} on a black background")
SHAPES_CONTEXTS = (
    "{it} at the top left on a white background",
    "{it} at the bottom right on a black background",
    "a very small {words} at the center on a grey background",
    "a very large {words} at the center on a white background",
    "a strongly tilted {words} at the top on a grey background",
    "a small upright {words} at the left on a black background",
    "a large slightly tilted {words} at the bottom on a white background",
    "a very small {words} at the right on a white background",
)
SHAPES_STYLES = ("a blueprint of {it}", "blueprint, center: {it}")


def make_groups(
    captions: Sequence[str], trigger: str | None, class_word: str | None, drawn_world: bool
) -> dict[str, list[str]]:
    """Group -> prompts, as `evaluation.prompt_groups` takes them. `trigger`: the word that captions use for what is taught, None where there is
    none, and then nothing is asked of it. `class_word`: what it is one of. `drawn_world`: the base knows the shapes world alone.

    Raises ConfigError for words of several lines, and for a class without a trigger.
    """
    if class_word and not trigger:
        raise ConfigError(f"--class {class_word!r} says what the trigger word is one of: give --trigger too")
    for option, word in {"--trigger": trigger, "--class": class_word}.items():
        if word is not None and (not word.strip() or word.splitlines() != [word]):
            raise ConfigError(
                f"{option} {word!r} is no word: give what the captions say, such as --trigger sks --class dog"
            )
    alone, contexts, styles = (
        (SHAPES_ALONE, SHAPES_CONTEXTS, SHAPES_STYLES) if drawn_world else (ALONE, CONTEXTS, STYLES)
    )
    groups = {"captions": list(captions)}
    if trigger:
        words = " ".join(filter(None, (trigger.strip(), class_word and class_word.strip())))
        kinds = {"trigger": alone, "contexts": contexts, "styles": styles}
        it = f"a {words}" if class_word or drawn_world else words
        groups |= {kind: [template.format(it=it, words=words) for template in kinds[kind]] for kind in kinds}
    scenes = world.sample_scenes(NUM_UNRELATED, "validation", 0)
    return groups | {"unrelated": [world.caption(scene) for scene in scenes] if drawn_world else list(UNRELATED)}
