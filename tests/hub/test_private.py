"""Nothing private goes out: what `public` leaves of values, and what `require_public` finds in texts, whoever wrote them."""

from pathlib import Path

import pytest

from t2ilib.config import ConfigError
from t2ilib.hub.private import public, public_run, require_public
from t2ilib.runfile import build_run


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("/home/ann/models/sd15", "sd15"),
        ("~/models/sd15", "sd15"),
        ("../ann/cat.safetensors", "cat.safetensors"),
        (r"C:\Users\ann\cat pictures", "cat pictures"),
        ("https://ann:secret@host.org/set/{0..9}.tar?token=abc#x", "https://host.org/set/{0..9}.tar"),
        ("user/model", "user/model"),
        ("pictures/cats", "pictures/cats"),
        ("a: red heart / blue star", "a: red heart / blue star"),
        ("...a red heart", "...a red heart"),
    ],
)
def test_what_is_left_of_a_text(text: str, seen: str) -> None:
    assert public({"field": [text, 1, None]}) == {"field": [seen, 1, None]}


def test_a_run_is_published_without_its_places() -> None:
    run = build_run(
        {
            "output": "/home/zoe/results/cat",
            "model": {"base": "/home/zoe/base"},
            "adapter": {"start": "/home/zoe/cat.safetensors"},
            "data": {"path": "/home/zoe/pictures", "cache_path": "/scratch/zoe"},
            "tracking": {"experiment": "cats", "uri": "https://zoe:secret@mlflow.example.org", "tags": {"who": "zoe"}},
        }
    )
    told = public_run(run)
    assert "zoe" not in str(told)
    assert (told["model"]["base"], told["adapter"]["start"]) == ("base", "cat.safetensors")
    assert build_run(told).optimizer == run.optimizer  # still a run that anybody can read


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fine\nhf_abcdefghijklmnopqrstuvwxyz", r"README.md, line 2: an access token \(hf_abc\.\.\.\)"),
        ("made in /home/ann/x", r"README.md, line 1: a path \(/home/\)"),
        (f'{{"path": "{Path.home()}/models"}}', r"README.md, line 1: a path"),
        (r"C:\\Users\\ann", r"README.md, line 1: a path"),
    ],
)
def test_what_must_not_go_out_is_named_with_its_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        require_public({"README.md": text, "other.md": "https://example.org/home/page, a/b, 3:4"})
    assert "other.md" not in str(error.value)
    assert "hf_abcdefg" not in str(error.value)
