"""What a study on one's own pictures can compare: for each name the small change it is to a plain LoRA, and why it may help.

`t2ilib study new` writes these into a study file, where they are the user's to change. Each changes one thing, over whatever the
file's `run` says; what takes two things at once is for the user to write.
"""

from t2ilib.studies.file import Variant

UNTOUCHED = Variant(
    title="Base model alone",
    overview="The untouched base model on the same prompts.",
    hypothesis="It draws what it was trained on, and not what only these pictures show.",
    how_it_helps="What the others gain or lose is measured from here.",
    origin="The control that every comparison needs.",
    run={"adapter": None, "training": {"trains": "nothing", "steps": 0}},
)

COMPARISONS: dict[str, Variant] = {
    "lora": Variant(
        title="LoRA",
        overview="Two thin matrices beside every attention projection of the UNet; everything else stands still.",
        hypothesis="Learns the pictures at the least cost.",
        how_it_helps="The smallest adapter in common use; captions are encoded once, and the text encoders can leave memory.",
        origin="LoRA (arXiv 2106.09685).",
    ),
    "dora": Variant(
        title="DoRA",
        overview="As LoRA, with a learned length of each weight vector beside its direction.",
        hypothesis="Learns more than LoRA at the same rank, and is slower.",
        how_it_helps="How far a weight points and where to can change apart, as they do when all weights are trained.",
        origin="DoRA (arXiv 2402.09353).",
        run={"adapter": {"kind": "dora"}},
    ),
    "rank32": Variant(
        title="LoRA of rank 32",
        overview="As LoRA, with matrices four times as wide.",
        hypothesis="Learns finer detail, and overfits sooner.",
        how_it_helps="More room for what is learned; a file four times as large.",
        origin="The rank is LoRA's one size (arXiv 2106.09685, section 7.2).",
        run={"adapter": {"rank": 32, "alpha": 32.0}},
    ),
    "many": Variant(
        title="LoRA on many layers",
        overview="LoRA on feed-forward, projection, convolution and time layers of the UNet besides attention.",
        hypothesis="Learns shapes and textures better, and forgets more.",
        how_it_helps="Convolutions hold how things look.",
        origin="Convolution LoRA as in LyCORIS (arXiv 2309.14859).",
        run={"adapter": {"targets": "many"}},
    ),
    "text_encoders": Variant(
        title="LoRA on the text encoders too",
        overview="LoRA on attention of the UNet and of the text encoders.",
        hypothesis="Learns what a new word means, and blurs what old words meant.",
        how_it_helps="A new word needs a place in the language as well as in the pictures.",
        origin="DreamBooth (arXiv 2208.12242) trains the text encoder for fidelity to its subject.",
        run={"adapter": {"text_encoder_targets": "attention"}},
    ),
    "dropout": Variant(
        title="LoRA with dropout",
        overview="As LoRA, with a tenth of the adapter's inputs dropped in every step.",
        hypothesis="Overfits less on few pictures.",
        how_it_helps="The adapter cannot lean on single input features.",
        origin="QLoRA's own setting (arXiv 2305.14314, appendix B).",
        run={"adapter": {"dropout": 0.1}},
    ),
    "rank_stabilized": Variant(
        title="Rank-stabilized LoRA",
        overview="As LoRA, its update divided by the square root of the rank instead of the rank.",
        hypothesis="Learns faster at the same learning rate.",
        how_it_helps="The size of an update does not shrink as the rank grows.",
        origin="rsLoRA (arXiv 2312.03732).",
        run={"adapter": {"rank_stabilized": True}},
    ),
    "nf4": Variant(
        title="LoRA over a 4-bit base",
        overview="As LoRA, with the linear layers of the base in 4 bits.",
        hypothesis="Learns as well in far less memory.",
        how_it_helps="The frozen weights are most of the memory; the adapter learns around what rounding lost.",
        origin="QLoRA (arXiv 2305.14314).",
        run={"model": {"quantization": "nf4"}},
    ),
    "int8": Variant(
        title="LoRA over an 8-bit base",
        overview="As LoRA, with the linear layers of the base in 8 bits.",
        hypothesis="Learns as well in less memory, and closer to the full base than in 4 bits.",
        how_it_helps="The frozen weights are most of the memory.",
        origin="LLM.int8() (arXiv 2208.07339).",
        run={"model": {"quantization": "int8"}},
    ),
    "unquantized": Variant(
        title="LoRA over the full base",
        overview="As LoRA, with the base in its own precision.",
        hypothesis="Learns what rounding the base would cost.",
        how_it_helps="Shows whether the memory that a 4-bit base saves has a price in quality.",
        origin="LoRA (arXiv 2106.09685).",
        run={"model": {"quantization": "none"}},
    ),
    "prodigy": Variant(
        title="LoRA with Prodigy",
        overview="As LoRA, with an optimizer that estimates the step size from the run itself.",
        hypothesis="Learns as much without a learning rate to choose.",
        how_it_helps="A learning rate moves results more than most methods do, and its best value is different for each.",
        origin="Prodigy (arXiv 2306.06101).",
        run={"optimizer": {"name": "prodigy", "learning_rate": 1.0}},
    ),
    "adamw8bit": Variant(
        title="LoRA with 8-bit AdamW",
        overview="As LoRA, with the optimizer's moments in 8 bits.",
        hypothesis="Learns the same.",
        how_it_helps="A quarter of the optimizer's memory, which is much for large adapters.",
        origin="8-bit optimizers (arXiv 2110.02861).",
        run={"optimizer": {"name": "adamw8bit"}},
    ),
    "lora_plus": Variant(
        title="LoRA+",
        overview="As LoRA, with a learning rate for B that is 16 times that of A.",
        hypothesis="Learns faster.",
        how_it_helps="B starts at zero and has farther to go.",
        origin="LoRA+ (arXiv 2402.12354).",
        run={"optimizer": {"lora_plus_ratio": 16.0}},
    ),
}
"""What `--compare` may name -> the variant. The first one named is what the others are compared with."""
