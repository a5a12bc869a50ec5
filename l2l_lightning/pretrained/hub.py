"""Files of rules on the Hugging Face Hub, fetched and uploaded by its own client.

The client's variables hold: HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE and the others.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from l2l_lightning.errors import HubError
from l2l_lightning.extras import needed_by

WEIGHTS, CARD = "rule.safetensors", "rule.json"
"""The names of a repository's files."""

MAX_BYTES = 2**28
"""No larger file is fetched: the package's rules have less than 200 kB."""


def is_repository(name: str) -> bool:
    """Tells whether a text names a repository: "USER/REPOSITORY", without a rule's ending.

    Example:
        >>> [is_repository(name) for name in ("user/lstm-7", "lstm-mnist", "user/a/b", "user/a.safetensors")]
        [True, False, False, False]
    """
    ours = name.endswith((".safetensors", ".ckpt"))
    return not ours and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII))


@needed_by("a rule of the Hugging Face Hub")
def fetch(repository: str, file: str, revision: str | None = None) -> Path:
    """Returns where a repository's file is on this disk; it is downloaded if it is not yet, or is outdated.

    Raises:
        HubError: There is no such repository, revision or file, the file is too large, the hub refuses, or it
            cannot be reached and the file is not in the cache.
        MissingPackageError: The package huggingface_hub is not installed.
    """
    from huggingface_hub import hf_hub_download

    with _explained(repository, f"load {file}", file, revision):
        size = hf_hub_download(repository, file, revision=revision, dry_run=True).file_size
        if size is not None and size > MAX_BYTES:
            raise HubError(
                f"{repository}: its {file} has {size:,} bytes, and no rule has more than {MAX_BYTES:,}"
            )
        return Path(hf_hub_download(repository, file, revision=revision))


@needed_by("push_to_hub")
def upload(repository: str, files: Mapping[str, bytes], private: bool | None, message: str) -> str:
    """Makes one commit of files, in a new repository if there is none; returns the commit's address.

    Raises:
        HubError: The hub refuses, or cannot be reached.
        MissingPackageError: The package huggingface_hub is not installed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="l2l-lightning")
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    with _explained(repository, "upload the rule"):
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)


def cached_rules() -> list[Path]:
    """Returns the weights of all rules in the hub's cache."""
    if find_spec("huggingface_hub") is None:
        return []
    from huggingface_hub import constants

    return sorted(Path(constants.HF_HUB_CACHE).glob(f"models--*/snapshots/*/{WEIGHTS}"))


@contextlib.contextmanager
def _explained(
    repository: str, what: str, file: str | None = None, revision: str | None = None
) -> Iterator[None]:
    """Says in one line what the hub's client raises, which takes many, by the name of the repository."""
    from huggingface_hub import constants, errors

    start = f"{repository} on {constants.ENDPOINT}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except HubError:
        raise
    except errors.LocalEntryNotFoundError as error:  # what the client makes of every failure of the network
        cause = error.__cause__ or error
        raise HubError(
            f"{start} cannot be reached, and what is asked for is not in the cache: {_line(cause)}"
        ) from error
    except errors.GatedRepoError as error:
        raise HubError(f"{start} is gated: ask for access on its page, and {log_in}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{start}: there is no such repository, or it is private: {log_in}. (Of a file, give the path "
            "with its ending .safetensors.)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{start} has no revision {revision!r}") from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{start} has no file {file}: it is not a rule that push_to_hub uploaded") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = f": {log_in}, with a token that may write" if status in (401, 403) else ""
        said = error.server_message or _line(error)
        raise HubError(f"{start} refuses to {what} ({status}: {said}){hint}") from error
    except Exception as error:  # what its transport raises, a full disk, a name that the hub has not
        raise HubError(f"{start}: cannot {what}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    lines: Any = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
