"""New words: what trains, what stays, what is said by whom, and that files mean the same elsewhere."""

import copy
import itertools
import json
import shutil
from pathlib import Path

import adapting
import diffusers
import numpy as np
import pytest
import torch
from adapting import fit, output_of, trainable
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from t2ilib.adapters.attach import AdapterError, AdapterProof, attach_adapters
from t2ilib.adapters.export import export_adapter, save_adapter
from t2ilib.adapters.load import load_adapter, read_metadata, weigh_adapters
from t2ilib.adapters.tokens import (
    add_words,
    embedding_of,
    file_names,
    last_step,
    load_embeddings,
    require_in_captions,
    starting_vectors,
)
from t2ilib.cli import app
from t2ilib.cli.adapters import tell_of
from t2ilib.config import AdapterSpec, ConfigError, ModelConfig, OptimizerConfig
from t2ilib.evaluation.sampling import draw
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import build_pipeline
from t2ilib.planning.trace import plan_memory
from t2ilib.runfile import build_run
from t2ilib.training.checkpoint import list_checkpoints, load_checkpoint
from t2ilib.training.loop import train
from t2ilib.training.optim import build_optimizer, parameter_groups

FAMILIES = ("sd15", "sdxl")
SPEC = AdapterSpec(rank=2, tokens={"<cat>": "a red circle", "sks": "square"}, token_vectors=2)
PROMPTS = ["a <cat> beside a small sks", "a red circle", "", "sks <cat> sks"]


def vectors_of(components):
    return {name: embedding_of(encoder).vectors for name, encoder in components.text_encoders.items()}


def learned(make, family="sdxl", spec=SPEC, steps=2):
    """A model whose words and adapter have learned a little."""
    components = make(family)
    attach_adapters(components, spec, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for vectors in vectors_of(components).values():
            vectors += 0.1 * torch.randn(vectors.shape, generator=generator)
    fit(components, num_steps=steps)
    return components


@torch.no_grad()
def encoded(components, prompts=PROMPTS):
    return components.encode_text(list(prompts))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_new_rows_train(make, monkeypatch, family) -> None:
    base = output_of(make(family))
    monkeypatch.setattr(adapting, "CAPTIONS", ["a <cat> and sks", "a small blue square"])
    components = make(family)
    kept = {name: embedding_of(encoder).weight.clone() for name, encoder in components.text_encoders.items()}
    before = encoded(components, ["a red circle", ""])
    attach_adapters(components, SPEC, 0)
    words = {
        f"{c}.{n}"
        for c in components.text_encoders
        for n, p in components.text_encoders[c].named_parameters()
        if p.requires_grad
    }
    assert len(words) == len(components.text_encoders)
    assert words <= trainable(components)
    proof = AdapterProof(components, SPEC)
    started = {name: vectors.detach().clone() for name, vectors in vectors_of(components).items()}
    losses = fit(components, proof, trains_text=True)  # by AdamW with weight decay on everything
    told = proof.finish()
    assert losses[-1] < losses[0]
    assert {name for name in told if "words" in name} == {
        f"adapter/words/{word}/{encoder}" for word in ("cat", "sks") for encoder in components.text_encoders
    }
    for name, vectors in vectors_of(components).items():
        assert vectors.shape == (4, kept[name].shape[1])
        assert bool((vectors != started[name]).any(1).all())
        assert torch.equal(embedding_of(components.text_encoders[name]).weight, kept[name])
    assert same(encoded(components, ["a red circle", ""]), before), "the base's own words mean what they meant"
    monkeypatch.undo()
    weigh_adapters(components, {"default": 0.0})
    assert torch.equal(output_of(components), base)


def test_a_word_lowers_the_loss_where_the_adapter_stands_still(make, monkeypatch) -> None:
    monkeypatch.setattr(adapting, "CAPTIONS", ["a <cat>", "a <cat> on a white background"])
    losses = {}
    for tokens in ({"<cat>": "circle"}, {}):
        components = make("sd15")
        if not tokens:
            monkeypatch.setattr(adapting, "CAPTIONS", ["a circle", "a circle on a white background"])
        spec = AdapterSpec(rank=1, targets=["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], tokens=tokens)
        attach_adapters(components, spec, 0)
        for name, parameter in components.unet.named_parameters():
            if "lora_A" in name:
                parameter.data.zero_()  # nothing comes from the adapter, nor a gradient to B
        losses[bool(tokens)] = fit(components, num_steps=8, trains_text=True)
    assert losses[True][0] == losses[False][0], "the word starts as what it is named after"
    assert losses[True][-1] < losses[False][-1]


def test_words_start_as_the_tokens_they_are_given(make) -> None:
    components = make("sd15")
    tokenizer, embedding = components.tokenizers["tokenizer"], embedding_of(components.text_encoders["text_encoder"])
    ids = tokenizer.encode("a red circle", add_special_tokens=False)
    a, red, circle = embedding.weight[ids]
    assert torch.equal(
        starting_vectors(tokenizer, embedding, "a red circle", 1), torch.stack([a, red, circle]).mean(0)[None]
    )
    assert torch.equal(starting_vectors(tokenizer, embedding, "a red circle", 3), torch.stack([a, red, circle]))
    assert torch.equal(
        starting_vectors(tokenizer, embedding, "a red circle", 2), torch.stack([a, torch.stack([red, circle]).mean(0)])
    )
    assert torch.equal(starting_vectors(tokenizer, embedding, "red circle", 4), torch.stack([red, red, circle, circle]))
    assert starting_vectors(tokenizer, embedding, "🐈", 1).isfinite().all(), (
        "of bytes, where the vocabulary has no more"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_files_mean_the_same_to_diffusers(make, tmp_path, family) -> None:
    """Its own loader, on a model that has seen nothing of ours, and its own way of spelling prompts."""
    components = learned(make, family)
    save_adapter(components, tmp_path)
    apart = make(family)
    apart.tokenizers = {name: copy.deepcopy(t) for name, t in apart.tokenizers.items()}  # which test models share
    pipeline, ours = build_pipeline(apart), build_pipeline(components)
    for file, word in ((tmp_path / "cat.safetensors", "<cat>"), (tmp_path / "sks.safetensors", "sks")):
        tensors = load_file(file)
        if family == "sd15":
            assert {key: tuple(x.shape) for key, x in tensors.items()} == {"emb_params": (2, 64)}
            pipeline.load_textual_inversion(file, token=word)
            continue
        assert {key: tuple(x.shape) for key, x in tensors.items()} == {"clip_l": (2, 64), "clip_g": (2, 128)}
        for key, part in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
            tokenizer = apart.tokenizers[part.replace("text_encoder", "tokenizer")]
            pipeline.load_textual_inversion(tensors[key], word, tokenizer, apart.text_encoders[part])
    arguments = (PROMPTS, "cpu", 1, False) if family == "sd15" else (PROMPTS, None, "cpu", 1, False)
    with torch.no_grad():
        theirs = [x for x in pipeline.encode_prompt(*arguments) if x is not None]
        by_pipeline = [x for x in ours.encode_prompt(*arguments) if x is not None]
    assert all(torch.equal(a, b) for a, b in zip(theirs, by_pipeline, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(encoded(components).values(), theirs, strict=True)), "as in training"
    assert components.spelled(PROMPTS) == ours.maybe_convert_prompt(PROMPTS, ours.tokenizer)
    assert components.spelled(["a <cat>"]) == ["a <cat> <cat>_1"]


def test_the_pooled_output_is_that_of_the_end(make) -> None:
    """SDXL's own config says that the end has id 2, whereupon transformers takes the largest id: a new word's."""
    components = make()
    encoder, tokenizer = components.text_encoders["text_encoder_2"], components.tokenizers["tokenizer_2"]
    plain = encoded(components, ["a red circle"])["pooled"]
    encoder.text_model.eos_token_id = 2
    add_words(
        components,
        {"<cat>": {n: torch.randn(1, embedding_of(e).embedding_dim) for n, e in components.text_encoders.items()}},
    )
    ids = components.tokenizers["tokenizer_2"](["a <cat> circle"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = encoder(ids).last_hidden_state[0, ids[0].tolist().index(tokenizer.eos_token_id)]
        assert torch.allclose(
            encoded(components, ["a <cat> circle"])["pooled"][0], encoder.text_projection(hidden), atol=1e-6
        )
    assert torch.equal(encoded(components, ["a red circle"])["pooled"], plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_brings_its_words(make, tmp_path, caplog, family) -> None:
    components = learned(make, family)
    file = save_adapter(components, tmp_path / "adapter", metadata={"modelspec.title": "x"})
    assert json.loads(read_metadata(file)["t2ilib.words"]) == {"<cat>": "cat.safetensors", "sks": "sks.safetensors"}
    other = make(family)
    load_adapter(other, tmp_path)
    assert trainable(other) == set()
    assert same(encoded(other), encoded(components))
    assert torch.allclose(output_of(other), output_of(components), atol=1e-5)
    with pytest.raises(ConfigError, match="<cat> has been added already"):
        load_embeddings(other, tmp_path / "adapter" / "cat.safetensors")
    (tmp_path / "adapter" / "cat.safetensors").unlink()
    load_adapter(make(family), tmp_path)
    assert "was trained together with <cat>, and cat.safetensors is not beside it" in caplog.text


def test_words_can_be_added_one_by_one(make, tmp_path) -> None:
    components = learned(make)
    save_adapter(components, tmp_path)
    other = make()
    assert load_embeddings(other, tmp_path / "sks.safetensors") == "sks"
    assert load_embeddings(other, tmp_path / "cat.safetensors") == "<cat>"
    assert same(encoded(other), encoded(components))
    assert make().tokenizers["tokenizer"].get_vocab().get("sks") is None, "what others hold is as it was"
    save_adapter(components, tmp_path / "again")
    for name in ("cat", "sks"):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (
            tmp_path / "again" / f"{name}.safetensors"
        ).read_bytes()


def test_embeddings_of_others(make, tmp_path) -> None:
    vectors = torch.randn(3, 64)
    files = {
        "My-Style.safetensors": ({"emb_params": vectors}, "my-style"),  # kohya, A1111: the name of the file
        "learned_embeds.safetensors": ({"<toy>": vectors.half()}, "<toy>"),  # diffusers: that of the tensor
        "one.safetensors": ({"<one>": vectors[0].clone()}, "<one>"),
    }
    for name, (tensors, word) in files.items():
        save_file(tensors, tmp_path / name)
        components = make("sd15")
        assert load_embeddings(components, tmp_path / name) == word
        row = embedding_of(components.text_encoders["text_encoder"]).vectors
        assert row.dtype == torch.float32
        assert torch.allclose(row, next(iter(tensors.values())).float())
        ids = components.tokenizers["tokenizer"](
            components.spelled([f"a {word.upper() if len(row) == 1 else word} b"])
        ).input_ids[0]
        assert sum(i >= 689 for i in ids) == len(row)
    with pytest.raises(ConfigError, match="holds emb_params, and embeddings for test are clip_l and clip_g"):
        load_embeddings(make(), tmp_path / "My-Style.safetensors")
    save_file({"emb_params": torch.randn(1, 768)}, tmp_path / "enormous.safetensors")
    with pytest.raises(
        ConfigError,
        match=r"shapes \{'text_encoder': \(1, 768\)\}, and .* take \{'text_encoder': 64\}: they are of another",
    ):
        load_embeddings(make("sd15"), tmp_path / "enormous.safetensors")
    with pytest.raises(ConfigError, match="can run any code"):
        load_embeddings(make("sd15"), tmp_path / "old.pt")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"circle": "square"}, "circle is a word that the text encoder of test knows.*such as <circle>"),
        ({"<cat>_1": "cat", "<dog>": "dog"}, None),
    ],
)
def test_words_that_are_taken(make, tokens, message) -> None:
    if message is None:
        attach_adapters(make(), AdapterSpec(tokens=tokens), 0)
    else:
        with pytest.raises(ConfigError, match=message):
            attach_adapters(make(), AdapterSpec(tokens=tokens), 0)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"<Cat>": "cat"}, "one word in small letters"),
        ({"a cat": "cat"}, "one word in small letters"),
        ({"<cat>": " "}, "<cat> needs words to start as"),
        ({"sks": "cat", "sks2": "dog"}, "sks is a part of sks2"),
    ],
)
def test_words_that_cannot_be(tokens, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterSpec(tokens=tokens)


def test_words_must_be_in_captions(make) -> None:
    components = make("sd15")
    attach_adapters(components, SPEC, 0)
    require_in_captions(components, ["", "a circle", "a <cat>", "sks, a square"])
    with pytest.raises(ConfigError, match=r"no training caption has sks .*data\.captions"):
        require_in_captions(components, ["a <cat>"])
    with pytest.raises(ConfigError, match=r"sks is also a part of a longer word of the caption 'he asks <cat>'.*<sks>"):
        require_in_captions(components, ["sks", "he asks <cat>"])
    cut = "red " * 29 + "<cat>"  # its second token is the one too many
    with pytest.raises(ConfigError, match=r"no training caption has <cat> .*within the 32 tokens"):
        require_in_captions(components, [cut, "sks"])
    require_in_captions(components, [cut.removeprefix("red "), "sks"])


def test_a_word_that_comes_late_is_proven_and_one_that_never_comes_is_not(make, monkeypatch) -> None:
    late = ["a <cat>"] * 2
    for captions in (late, ["a <cat> sks"] * 2):
        monkeypatch.setattr(adapting, "CAPTIONS", ["a red circle", "a <cat>"])
        components = make("sd15")
        attach_adapters(components, SPEC, 0)
        proof = AdapterProof(components, SPEC)
        group = parameter_groups(components.modules(), OptimizerConfig())
        assert [g["name"] for g in group] == ["unet", "text_encoder.words"]
        for number in range(9):
            if number == 8:
                monkeypatch.setattr(adapting, "CAPTIONS", captions)
            step(components, group, proof, number + 1)
        if captions is late:
            with pytest.raises(AdapterError, match=r"new words never moved.*: sks in text_encoder\. No step has seen"):
                proof.finish()
        else:
            assert proof.finish()["adapter/words/sks/text_encoder"] > 0


def step(components, groups, proof, number):
    """One step of a run's own optimizer, weight decay included."""
    optimizer = build_optimizer([dict(group) for group in groups], OptimizerConfig(weight_decay=0.1))
    words = next(g for g in optimizer.param_groups if g["name"].endswith("words"))
    assert words["weight_decay"] == 0
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(number))
    text = components.encode_text(adapting.CAPTIONS)
    components.unet(latents, torch.tensor([10, 500]), **text).sample.square().mean().backward()
    proof.observe(number)
    optimizer.step()
    optimizer.zero_grad()


def test_words_are_float32_over_a_base_in_half_precision(make) -> None:
    components = make()
    for module in components.modules().values():
        module.bfloat16()
    attach_adapters(components, SPEC, 0)
    for name, encoder in components.text_encoders.items():
        assert embedding_of(encoder).vectors.dtype == torch.float32
        assert encoder.dtype == torch.bfloat16, "what pipelines take its precision for"
        assert embedding_of(encoder)(torch.tensor([[0, embedding_of(encoder).first]])).dtype == torch.bfloat16, name
    text = components.encode_text(["a <cat>", "sks"])
    text["pooled"].float().sum().backward()
    assert vectors_of(components)["text_encoder_2"].grad.dtype == torch.float32


def test_gradients_reach_words_through_four_bits(make) -> None:
    components = load_base(ModelConfig(base="tiny-sd15", quantization="nf4"))
    attach_adapters(components, SPEC, 0)
    with torch.no_grad():
        components.encode_text(["a <cat> sks"])  # a pass for drawing comes first, as in a run
    components.encode_text(["a <cat> sks"])["encoder_hidden_states"].square().sum().backward()
    assert bool(vectors_of(components)["text_encoder"].grad.any(1).all())


def test_they_have_a_rate_of_their_own(make) -> None:
    components = make()
    modules = attach_adapters(components, SPEC.model_copy(update={"text_encoder_targets": "attention"}), 0)
    config = OptimizerConfig(learning_rate=1e-4, text_encoder_learning_rate=1e-5, token_learning_rate=1e-3)
    groups = {group["name"]: (group["lr"], group.get("weight_decay")) for group in parameter_groups(modules, config)}
    assert groups == {
        "unet": (1e-4, None),
        "text_encoder": (1e-5, None),
        "text_encoder.words": (1e-3, 0.0),
        "text_encoder_2": (1e-5, None),
        "text_encoder_2.words": (1e-3, 0.0),
    }
    plain = {
        g["name"]: g["lr"] for g in parameter_groups(modules, config.model_copy(update={"token_learning_rate": None}))
    }
    assert plain["text_encoder.words"] == 1e-4


def test_file_names_fit_every_system() -> None:
    names = file_names(["<cat>", "cat!", "🐈", "a/b", "..", "Ö"])
    assert list(names.values()) == [
        "cat.safetensors", "cat-2.safetensors", "word.safetensors", "a_b.safetensors", "word-2.safetensors", "Ö.safetensors",
    ]  # fmt: skip


def run_of(output: Path, share=0.5, **sections):
    values = {
        "output": str(output),
        "model": {"base": "tiny-sd15"},
        "adapter": {"rank": 2, "tokens": {"<heart>": "circle"}, "token_vectors": 2, "token_share": share},
        "data": {"source": "shapes", "captions": [{"trigger": "<heart>"}]},
        "shapes": {"scenes": ["heart"], "num_pictures": 8},
        "optimizer": {"token_learning_rate": 1e-2},
        "training": {
            "steps": 4,
            "batch_size": 2,
            "checkpoint_every": 1,
            "keep_checkpoints": 9,
            "gradient_checkpointing": True,
        },
        "evaluation": {
            "validate_every": 0,
            "validation_timesteps": 1,
            "num_inference_steps": 2,
            "prompts": ["a <heart>"],
        },
    }
    return build_run(values | {name: {**values.get(name, {}), **section} for name, section in sections.items()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("words"))
    return run, train(run)


def test_after_their_share_they_stand_still_also_where_a_run_went_on(trained, tmp_path) -> None:
    run, _ = trained
    stored = [load_checkpoint(path).tensors for path in list_checkpoints(run.output / "checkpoints")]
    key = next(name for name in stored[0]["weights"] if name.endswith("token_embedding.vectors"))
    words = [tensors["weights"][key] for tensors in stored]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(words)] == [False, True, True]
    assert last_step(run.adapter, 4) == 2
    again = run_of(
        tmp_path / "again", training={"steps": 4, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 1}
    )
    stopped = again.model_copy(update={"training": again.training.model_copy(update={"steps": 3})})
    assert again.training_digest() != stopped.training_digest(), "a share is of so many steps"
    shutil.copytree(run.output, tmp_path / "again")
    for path in list_checkpoints(tmp_path / "again" / "checkpoints")[1:]:
        shutil.rmtree(path)
    result = train(run_of(tmp_path / "again"))
    assert result.resumed_from == 1
    for name in ("heart.safetensors", "pytorch_lora_weights.safetensors"):
        straight, resumed = (load_file(folder / "adapter" / name) for folder in (run.output, tmp_path / "again"))
        assert all(torch.equal(straight[k], resumed[k]) for k in straight), name


def test_a_run_draws_from_disk_as_it_does_in_memory(trained, tmp_path) -> None:
    run, result = trained
    in_memory = draw(result.components, ["a red <heart>"], run.evaluation)[0]
    words = ["--prompt", "a red <heart>", "--steps", "2", "--guidance", "3"]

    def drawn(number, *more):
        done = CliRunner().invoke(app, ["generate", *words, "--out", str(tmp_path), *more])
        assert done.exit_code == 0, done.output
        return np.asarray(Image.open(tmp_path / f"{number:02d}.png")), done.output

    assert (drawn(0, "--adapter", str(run.output))[0] == np.asarray(in_memory)).all()
    assert (drawn(1, "--adapter", str(run.output), "--checkpoint", "4")[0] == np.asarray(in_memory)).all()
    alone, told = drawn(2, "--model", "tiny-sd15", "--embedding", str(run.output / "adapter" / "heart.safetensors"))
    assert "in prompts it is called <heart>" in told
    assert (alone != np.asarray(in_memory)).any()
    metadata = read_metadata(run.output / "adapter" / "pytorch_lora_weights.safetensors")
    assert metadata["modelspec.trigger_phrase"] == "<heart>"
    rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert next(row for row in rows if "grad_norm" in row)["learning_rate/text_encoder.words"] == 1e-2


def test_exports_take_the_words_along(trained, tmp_path, capsys) -> None:
    run, result = trained
    kohya = export_adapter(run.output, tmp_path / "kohya" / "lora.safetensors", "kohya")
    assert {path.name for path in kohya.parent.iterdir()} == {"lora.safetensors", "heart.safetensors"}
    tell_of(kohya)
    assert f"<heart>: {kohya.with_name('heart.safetensors')}, for an embeddings folder" in capsys.readouterr().out
    components = load_base(run.model)
    load_adapter(components, kohya)
    assert same(encoded(components, ["a <heart>"]), encoded(result.components, ["a <heart>"]))
    with pytest.raises(ConfigError, match=r"heart\.safetensors exists already"):
        export_adapter(run.output, tmp_path / "kohya" / "other.safetensors", "kohya")
    with pytest.raises(ConfigError, match="would also be the file of one of its words"):
        export_adapter(run.output, tmp_path / "heart.safetensors", "kohya")
    merged = export_adapter(run.output, tmp_path / "merged", "merged")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(merged, safety_checker=None)
    with torch.no_grad():
        found = pipeline.encode_prompt(["a <heart>"], "cpu", 1, False)[0]
    assert torch.equal(found, encoded(result.components, ["a <heart>"])["encoder_hidden_states"])


def test_a_plan_has_the_text_encoder_on_the_device(tmp_path) -> None:
    planned = plan_memory(run_of(tmp_path), "cuda").phases["training"]
    components = load_base(ModelConfig(base="tiny-sd15"))
    working = [p.numel() * 2 for module in components.modules().values() for p in module.parameters()]
    assert planned["weights"] == pytest.approx(sum(working), rel=0.05), "in bfloat16, without the VAE"
    attach_adapters(components, AdapterSpec(rank=2), 0)
    lora = sum(max(512, p.numel() * 4) for p in components.unet.parameters() if p.requires_grad)
    assert planned["adapters"] == pytest.approx(lora + 2 * 64 * 4, abs=600), "two vectors of 64 in float32"


def test_words_that_nothing_says_stop_a_run(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no training caption has <heart>.*trigger: <heart>"):
        train(run_of(tmp_path, data={"captions": []}))
