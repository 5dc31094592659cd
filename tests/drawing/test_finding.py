"""Finding adapters: of runs, newest first, of MLflow's registry, and the bases they go with."""

import os
import shutil

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from t2ilib.config import ConfigError, ModelConfig
from t2ilib.drawing.finding import base_of, change_base, list_adapters, resolve
from t2ilib.drawing.settings import AdapterChoice
from t2ilib.tracking.models import MODEL_TAG, find_adapter, register_version, registered
from t2ilib.tracking.store import tracking_uri

FILE = "pytorch_lora_weights.safetensors"


def choice(path, step=None):
    return AdapterChoice(path=str(path), step=step)


def test_runs_are_listed_newest_first_with_what_tells_them_apart(results):
    for name, when in (("cat", 3), ("words", 1), ("study-quick/pissa/seed0", 2)):
        os.utime(results / name / "adapter" / FILE, (10**9 + when,) * 2)
    found = list_adapters(results)
    assert [(f.name, f.base, f.kind, f.rank, f.steps, f.finished) for f in found] == [
        ("cat", "tiny-sdxl", "lora", 2, (1, 2), True),
        ("study-quick/pissa/seed0", "tiny-sdxl", "lora", 2, (1, 2), True),
        ("words", "tiny-sd15", "lora", 2, (1, 2), True),
    ]
    assert [f.when.timestamp() for f in found] == [10**9 + 3, 10**9 + 2, 10**9 + 1]
    assert found[0].path == results / "cat"
    assert list_adapters(results / "cat")[0].name == "cat"
    assert list_adapters(results / "nowhere") == []


def test_what_is_no_adapter_of_today_is_left_out(results, tmp_path, caplog):
    shutil.copytree(results / "cat", tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished" / "adapter")
    shutil.copytree(tmp_path / "unfinished", tmp_path / "begun")
    shutil.rmtree(tmp_path / "begun" / "checkpoints")
    for folder in ("old", "mlflow-artifacts/1/x", ".hidden", "a/b/c/d/e"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "run.yaml").write_text("adaptor: {}\n")
    found = list_adapters(tmp_path)
    assert [(f.name, f.finished, f.steps) for f in found] == [("unfinished", False, (1, 2))]
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == [str(tmp_path / "old")]


def test_a_choice_leads_to_its_file_or_to_the_run_that_has_its_step(results):
    assert resolve(choice(results / "cat")) == results / "cat" / "adapter" / FILE
    assert resolve(choice(results / "cat" / "adapter" / FILE)) == results / "cat" / "adapter" / FILE
    assert resolve(choice(results / "words", 1)) == results / "words" / "steps" / "step-000001" / "adapter" / FILE
    assert resolve(choice(results / "cat", 1)) == results / "cat"
    with pytest.raises(ConfigError, match="has no checkpoint of step 5; there are 1, 2"):
        resolve(choice(results / "cat", 5))
    with pytest.raises(ConfigError, match="no adapter at"):
        resolve(choice(results))


def test_the_base_is_the_runs(results, tmp_path):
    assert base_of(choice(results / "words")).base == "tiny-sd15"
    assert base_of(choice(results / "words", 1)).base == "tiny-sd15"
    alone = tmp_path / "alone.safetensors"
    shutil.copy(results / "cat" / "adapter" / FILE, alone)
    assert base_of(choice(alone)) is None


def test_another_base_takes_nothing_of_the_first_along():
    first = ModelConfig(base="a", vae="b", revision="c", quantization="nf4", quantization_skip=("d",), clip_skip=1)
    assert change_base(first) == first
    assert change_base(first, base="a", clip_skip=0) == first.model_copy(update={"clip_skip": 0})
    assert change_base(first, base="e") == ModelConfig(base="e", quantization="nf4", clip_skip=1)
    assert change_base(first, quantization="none") == first.in_full()
    with pytest.raises(ConfigError, match=r"in the base:\n.*quantization: 'nf5' does not exist"):
        change_base(first, quantization="nf5")


@pytest.fixture(scope="module")
def champion(results):
    """The run `cat` registered as a study's champion; its logged model's own URI."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        client = MlflowClient(tracking_uri(None, results))
        (run,) = client.search_runs([client.get_experiment_by_name("toys").experiment_id])
        logged = run.data.tags[MODEL_TAG]
        assert (
            register_version(client, "toys-full", logged, run.info.run_id, "champion", {})
            == "models:/toys-full@champion"
        )
    return logged


def test_the_registrys_adapters_are_found_with_their_runs(results, champion, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    written = load_file(results / "cat" / "adapter" / FILE)
    for uri in ("models:/toys-full@champion", "models:/toys-full/1", champion):
        file = resolve(choice(uri), results)
        found = load_file(file)
        assert found.keys() == written.keys()
        assert all((found[key] == written[key]).all() for key in written)
        assert base_of(choice(uri), results).base == "tiny-sdxl"
        assert file.is_relative_to(results), "a store on this machine is read where it lies"
    assert registered(tracking_uri(None, results)) == ["models:/toys-full@champion"]
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_what_the_registry_lacks_is_told_with_what_it_has(results, champion, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for uri in ("models:/other@champion", "models:/toys-full@best", "models:/toys-full/7", "models:/m-123"):
        with pytest.raises(
            ConfigError, match=rf"{uri} is not in the MLflow store .*registered are: models:/toys-full@champion"
        ):
            resolve(choice(uri), results)
    with pytest.raises(ConfigError, match=r"there is no MLflow store at .*mlflow.db yet; set MLFLOW_TRACKING_URI"):
        resolve(choice("models:/toys-full@champion"), tmp_path)
    assert not list(tmp_path.iterdir()), "asking makes no store"
    assert registered(tracking_uri(None, tmp_path)) == []
    with pytest.raises(ConfigError, match="is one adapter, without steps"):
        resolve(choice("models:/toys-full@champion", 1), results)


def test_a_model_without_a_runs_files_is_taken_from_the_model_itself(results, champion, tmp_path, monkeypatch):
    """As MLflow's diffusers flavor stores it, whoever logged it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("t2ilib.tracking.models.run_artifacts", lambda *arguments: None)
    file = find_adapter("models:/toys-full@champion", tracking_uri(None, results), tmp_path)
    assert file.is_relative_to(tmp_path)
    assert load_file(file).keys() == load_file(results / "cat" / "adapter" / FILE).keys()
