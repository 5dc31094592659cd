"""A folder into a repository of the Hub, by huggingface_hub: what is there already is not sent again, so an interrupted push is repeated."""

from pathlib import Path

from t2ilib.config import ConfigError

AGAIN = "the same command goes on where it was"


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Uploads `folder` as the model `repository` (user/name), which is made if it is not there; returns its address.

    Raises ConfigError, in a sentence that says what to do, without a token, without rights, without a network, for a name that cannot
    be, for a repository that holds something else, and for a public one where a private one was asked for.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    if repository.count("/") != 1:
        raise ConfigError(f"{repository!r} is no repository: write user/name")
    if get_token() is None:
        raise ConfigError("the Hub needs a token that may write: `hf auth login`, or the environment's HF_TOKEN")
    api = HfApi(library_name="t2ilib")
    try:
        if api.repo_exists(repository):
            require_ours(api, repository, private)
        else:
            api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Push by t2ilib")
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} cannot be a repository's name: {error}") from None
    except OfflineModeIsEnabled:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it") from None
    except HfHubHTTPError as error:
        raise ConfigError(refusal(error, repository)) from None
    except (HTTPError, ConnectionError) as error:
        raise ConfigError(f"{api.endpoint} cannot be reached ({error or type(error).__name__}): {AGAIN}") from None
    return f"{api.endpoint}/{repository}"


def require_ours(api, repository: str, private: bool) -> None:
    """Raises ConfigError for a repository that is not empty and was not pushed by t2ilib, or is public where `private` is asked for."""
    info = api.model_info(repository)
    files = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
    if files and "run.yaml" not in files:
        raise ConfigError(
            f"{repository} exists, and holds files that t2ilib did not push ({', '.join(sorted(files)[:4])}): choose another name"
        )
    if private and not info.private:
        raise ConfigError(
            f"{repository} exists and is public: make it private in its settings on the Hub, or leave --private out"
        )


def refusal(error, repository: str) -> str:
    """Why the Hub did not do it, and what to do."""
    status = error.response.status_code
    said = (error.server_message or "").strip() or f"status {status}"
    user = repository.partition("/")[0]
    return {
        401: f"the Hub does not know this token ({said}): `hf auth login` with a new one",
        403: f"this token may not write to {repository} ({said}): use one with the right to write, of a member of {user}",
        404: f"{repository} is not there for this token ({said}): check {user!r}, and that the token may write to it",
        409: f"{repository} is being changed by somebody else ({said}): try again",
        413: f"the Hub takes no files of this size ({said})",
        429: f"the Hub is asked too often ({said}): wait; {AGAIN}",
    }.get(status, f"the Hub answers {status} ({said}): {AGAIN}")
