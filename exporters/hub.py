"""Checkpoints by their name on the Hugging Face hub: what the export reads of them is fetched into the hub's cache.

The rules are huggingface_hub's: HF_TOKEN (or the token of ``hf auth login``), HF_HOME and HF_HUB_CACHE, HF_HUB_OFFLINE,
HF_ENDPOINT. https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..models.errors import BackendError, CheckpointError

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    INDEX,
)


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies, and where it is from."""

    path: Path
    name: str  # on the hub, or of its directory
    revision: str = ""  # commit, of one from the hub


def find(
    checkpoint: str | Path,
    revision: str | None = None,
    look: Callable[[Path], object] = lambda directory: None,
) -> Source:
    """A directory as it is, or a checkpoint of the hub, fetched.

    ``look`` sees the directory with the small files before the weights are fetched, and may raise. ``revision``: a
    branch, tag or commit on the hub, None: main. A directory goes before a name on the hub. Raises CheckpointError for
    what cannot be found or fetched, and for a revision of a directory; BackendError without huggingface_hub.
    """
    path = Path(checkpoint)
    name = str(checkpoint)
    if path.exists() or not ID.fullmatch(name):
        if revision is not None:
            raise CheckpointError(
                f"{name}: a revision ({revision}) goes with a name on the hub, such as Qwen/Qwen2.5-VL-3B-Instruct"
            )
        return Source(path, path.resolve().name)
    directory = _fetch(name, revision, SMALL)
    look(directory)
    commit = directory.name
    _fetch(name, commit, [SINGLE])
    if not (directory / SINGLE).is_file() and (shards := _shards(name, directory)):
        _fetch(name, commit, shards)
    return Source(directory, name, commit)


def _shards(name: str, directory: Path) -> list[str]:
    """The weight files that the index names. Raises CheckpointError where there is none."""
    index = directory / INDEX
    if not index.is_file():
        raise CheckpointError(
            f"{name}: has no {SINGLE} and no {INDEX} at the hub; PyTorch .bin files are not read: convert them to "
            "safetensors, or take a revision that has some"
        )
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({file for file in listed if isinstance(file, str)})
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []  # the index is refused when the checkpoint is opened


def _fetch(name: str, revision: str | None, files: list[str] | tuple[str, ...]) -> Path:
    """Download what is not there yet; returns the directory of that commit."""
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import logging
    except ImportError as err:
        raise BackendError(
            f"{err.name} is not installed; checkpoints by name need: pip install 'ppexport[export]'"
        ) from err
    no_directory = f"{name}: there is no such directory, and as a name on the Hugging Face hub"
    logging.set_verbosity_error()  # that no file is called so is said below, in a line of our own
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except hub.GatedRepoError as err:
        raise CheckpointError(
            f"{name}: is gated: ask for access on its page at the hub, and give a token of that account (HF_TOKEN, or "
            "'hf auth login')"
        ) from err
    except hub.RepositoryNotFoundError as err:
        raise CheckpointError(
            f"{no_directory} it was not found, or it is private; expected a checkpoint directory, or a name such as "
            "Qwen/Qwen2.5-VL-3B-Instruct (HF_TOKEN opens private ones)"
        ) from err
    except hub.RevisionNotFoundError as err:
        raise CheckpointError(
            f"{name}: has no revision {revision!r}, expected a branch, tag or commit"
        ) from err
    except hub.LocalEntryNotFoundError as err:
        raise CheckpointError(
            f"{no_directory} it is not (or not whole) in the cache, and cannot be fetched: {_reason(err)}"
        ) from err
    except Exception as err:  # what the libraries below it raise has no class in common
        raise CheckpointError(f"{name}: cannot be fetched from the hub: {_reason(err)}") from err


def _reason(err: BaseException) -> str:
    """One line that says why."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    cause = err.__cause__ or err
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
