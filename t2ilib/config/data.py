"""The sections about data: which captioned pictures, how they become samples, pictures of the class, and the drawn world."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from t2ilib.config.mistakes import did_you_mean
from t2ilib.config.section import Location, Place, Positive, Section, Share

SOURCES = ("folder", "coco", "flickr30k", "huggingface", "webdataset", "preferences", "shapes")
CaptionEdit = str | dict[str, Any]
"""`name`, or `{name: argument}`."""


class DataConfig(Section):
    """Which captioned pictures, and how they become samples."""

    source: str = "folder"
    """folder, coco, flickr30k, huggingface, webdataset, preferences, shapes, or a function in a Python file: `my_source.py:load`, which
    takes this section and gives a `data.records.Listing`."""
    path: Location | None = None
    """folder: an image folder with metadata.jsonl, .csv or .parquet, a .txt caption beside each picture, or no captions and a
    `prompt`. coco, flickr30k: the folder of the data set. huggingface: an id or a folder. webdataset: shards, as a folder, pattern or
    URL. preferences: a folder with preferences.jsonl or that file, or Pick-a-Pic's rows, as Parquet, a folder or an id."""
    split: str | None = None
    """Which part, where a source has several: `train` (coco, flickr30k, huggingface, preferences as rows) without it."""
    subset: str | None = None
    """huggingface, preferences: which of a data set's configurations."""
    revision: str | None = None
    """huggingface, preferences: a branch, tag or commit of the Hub's data set."""
    validation_path: Location | None = None
    """Held-out pictures; without it and `validation_split` `validation_share` of the pictures is held out."""
    validation_split: str | None = None
    validation_share: Share = 0.125
    """Chosen by the names of pictures, or of preference pairs by their captions: all pairs of a prompt are on one side."""
    sample: Positive | None = None
    """So many of the training pictures, drawn by the run's seed. Seeds of a study then differ in their pictures too, and its intervals say
    what other pictures of the kind would give. None: all of them."""
    part: Literal["final", "tuning"] = "final"
    """tuning: what a study searches its settings on, and its final runs are not judged by. Pictures that are held out otherwise take no
    part, `validation_share` of the training pictures is held out in their place; the drawn world draws other scenes for all."""
    streaming: bool = False
    """huggingface, webdataset: read from front to back as training goes, and never held as a whole."""
    image_column: str | None = None
    """None: `file_name` in tables; of a Hugging Face data set the one that holds pictures. What is found is logged."""
    caption_column: str | None = None
    """Of text, or of lists of it: several captions of one picture. None: `text` in tables; else the first of the usual names."""
    mask_column: str | None = None
    """Pictures of where the loss counts (white) and where it does not (black)."""
    weight_column: str | None = None
    """Of each picture's loss."""
    repeat_column: str | None = None
    """How often an epoch shows each picture."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Subfolder, or name pattern such as `cats/*` -> weight of the loss of the pictures there."""
    repeats: dict[str, Positive] = {}
    """The same for how often an epoch shows them."""
    folder_repeats: bool = False
    """Subfolders that are called `10_cat` are shown ten times, as kohya's trainers have it."""
    prompt: str | None = None
    """The caption of pictures that have none (DreamBooth's instance prompt)."""
    captions: tuple[CaptionEdit, ...] = ()
    """What is done to every caption before it is used, in order: names of `data.captions.TRANSFORMS`, or {name: argument}."""
    edit_held_out: bool = True
    """Whether captions of held-out pictures are edited too. A study of caption edits compares on the captions as they were."""
    tagger: str = "pattern"
    """What tells parts of speech for `captions`: a name of `data.tagging.TAGGERS`."""
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    stages: dict[Annotated[int, Field(ge=8, multiple_of=8)], Positive] = {}
    """Smaller resolutions before that one -> for how many steps each, rising: {32: 400} begins with 400 steps at 32 pixels."""
    buckets: bool = False
    """Pictures keep their aspect ratio: each has the size, of about `resolution` squared pixels, that is nearest to it."""
    crop: Literal["center", "random"] = "center"
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a picture is mirrored. Captions that say left or right become wrong."""
    views: Positive = 1
    """How many random crops, flips and orders of tags of each picture there are; each step draws one of them."""
    alpha: Literal["ground", "mask"] = "ground"
    """What is transparent in a picture is laid over `ground`; with `mask` the loss does not count there either."""
    ground: str = "white"
    """What is transparent in a picture is laid over this colour: a name, or "#rrggbb" in quotes."""
    cache: Literal["all", "latents", "off"] = "all"
    """What is encoded once and kept on disk: latents and text, latents alone, or nothing. The rest is encoded in every step."""
    cache_path: Place | None = None
    """None: `encoded` in T2ILIB_CACHE, or in the user's cache folder."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Threads that decode pictures; None: as many as there are cores."""
    on_error: Literal["stop", "skip"] = "stop"
    """What files that cannot be used do (a corrupt picture, one without caption): stop the run where they are more than
    `max_rejected`, or be rejected, counted and logged however many they are."""
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The share of what was found that may be rejected before `on_error: stop` stops."""

    @field_validator("source")
    @classmethod
    def a_source(cls, value: str) -> str:
        if value in SOURCES or ".py:" in value:
            return value
        raise ValueError(
            f"{value!r} does not exist; choose {', '.join(SOURCES)}, or name a function in a Python file (my_source.py:load)."
            f"{did_you_mean(value, SOURCES)}"
        )

    @field_validator("ground", mode="before")
    @classmethod
    def an_opaque_colour(cls, value: Any) -> Any:
        from PIL import ImageColor

        hint = """name a colour as CSS does, or write "#rrggbb" with its quotes, without which YAML reads a comment or a number"""
        try:
            channels = ImageColor.getrgb(value)
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{value!r} is not a colour: {hint}") from None
        if len(channels) > 3:
            raise ValueError(f"{value!r} has alpha, and nothing lies below the ground: leave it out")
        return value

    @model_validator(mode="after")
    def holds_together(self) -> "DataConfig":
        for name in ("subset", "revision"):
            if getattr(self, name) is not None and self.source not in ("huggingface", "preferences"):
                raise ValueError(f"{name} is about data.source huggingface, and source is {self.source}: leave it out")
        if self.streaming and self.sample is not None:
            raise ValueError(
                "sample draws among all pictures, and a stream is never held as a whole: leave one of them out"
            )
        if self.streaming and self.source not in ("huggingface", "webdataset"):
            raise ValueError(f"streaming is for huggingface and webdataset: {self.source} is read as a whole")
        if self.part == "tuning" and self.streaming:
            raise ValueError(
                "part tuning divides the training pictures, and a stream cannot be divided before it is read: leave streaming out"
            )
        sides = [*self.stages, self.resolution]
        if sides != sorted(set(sides)):
            raise ValueError(
                f"stages must rise to resolution {self.resolution}, and they are {', '.join(map(str, self.stages))}"
            )
        if self.stages and self.streaming:
            raise ValueError(
                "stages needs data that can be read twice: leave streaming out, or train each resolution as a run of its own"
            )
        if self.views > 1 and self.crop == "center" and self.flip in (0, 1) and not self.captions:
            raise ValueError(f"all {self.views} views of a picture would be the same: set crop to random, or flip")
        return self


class PriorConfig(Section):
    """Prior preservation (DreamBooth, arXiv 2208.12242): pictures of the class, so that what the base knows of it is kept."""

    path: Place | None = None
    """An image folder of the user's own; without it the base draws `num_pictures` of `prompts`, once for all runs."""
    prompts: tuple[str, ...] = ()
    """What the base draws. `{red|green}` is one of these words, a picture each its own. With `path` one prompt, the caption of pictures
    that have none (DreamBooth's class prompt)."""
    num_pictures: Positive = 200
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of what steps see: of every batch, where that is a whole number, and otherwise spread evenly over the steps."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """The loss is the mean over one's own pictures, and so many times the mean over these."""

    @model_validator(mode="after")
    def pictures_or_prompts(self) -> "PriorConfig":
        if self.path is None and not self.prompts:
            raise ValueError("give path, a folder of pictures of the class, or prompts for the base to draw")
        if self.path is not None and len(self.prompts) > 1:
            raise ValueError(
                f"beside path one prompt is the caption of pictures that have none, and there are {len(self.prompts)}: leave path out"
                " for the base to draw them"
            )
        return self


CAPTIONED = ("shape", "color", "size", "position", "background", "tilt")
"""The attributes of the drawn world that a caption may leave open, but for the shape."""


class ShapesConfig(Section):
    """The drawn world, for `data.source: shapes`: which pictures are drawn, how many are checked, and which part of a tiny model
    is trained on them alone. Beside `data.source: preferences` it says what the checker judges of a run on pairs of the drawn world."""

    scenes: tuple[Literal["base", "heart", "striped", "blueprint"], ...] = ("base",)
    """What is drawn, in equal shares: `base` and the concepts outside it."""
    num_pictures: Positive = 48
    """How many training pictures are drawn."""
    jitter: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How far position, size, tilt and colour stray from their nominal values."""
    seed: int = 0
    """Which pictures are drawn. Apart from the run's seed, so that all seeds of a study share their data."""
    checked_prompts: Annotated[int, Field(ge=0)] = 48
    """How many prompts of the concepts, and of the base world, the checker judges at the end."""
    captioned: tuple[Literal[CAPTIONED], ...] | None = None
    """The attributes that captions and test prompts speak of, the shape among them, beside fill and style, of which they always do; what
    is left open is any, and counts as right. None: all."""
    trains: Literal["vae", "clip"] | None = None
    """The parts of a tiny model that come before its UNet, in place of what `training.trains` names."""
    crop: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    """For the VAE: the side of random crops; None trains on whole pictures."""

    @field_validator("scenes")
    @classmethod
    def each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"name each kind once, and at least one, not {', '.join(value) or 'none'}")
        return value

    @field_validator("captioned")
    @classmethod
    def of_a_shape(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and ("shape" not in value or len(set(value)) < len(value)):
            raise ValueError(f"name the shape, and each attribute once, not {', '.join(value) or 'none'}")
        return value

    @model_validator(mode="after")
    def read_in_full(self) -> "ShapesConfig":
        if self.captioned is not None and self.trains == "clip":
            raise ValueError(
                "captioned is about what is drawn, and a CLIP learns from captions that say all: leave it out"
            )
        return self

    @model_validator(mode="after")
    def crops_are_the_autoencoders(self) -> "ShapesConfig":
        if self.crop is not None and self.trains != "vae":
            raise ValueError("crop is about training the VAE: set trains to vae, or leave it out")
        return self
