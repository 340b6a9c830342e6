"""Fetches weights from the Hugging Face Hub through its own library, which caches, authenticates and retries.

Its environment variables apply: HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and others. The library is
imported only where it is used, because the import takes 0.2 s.
"""

import errno
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.errors import UserError, shortened, write_message
from jaxft.files import reason
from jaxft.main_process import is_main_process
from jaxft.pretrained.declared import CONFIG, MAX_CONFIG, describes, read_small_json
from jaxft.pretrained.families import FAMILIES
from jaxft.pretrained.processor import PREPROCESSOR
from jaxft.pretrained.shards import MAX_INDEX, read_index
from jaxft.pretrained.state_dict import excerpt

PREFIX = "hf:"
# The weights that timm and transformers save, the preferred ones first; an index names several files.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MAX_BYTES = 10_000_000_000  # of the weights; the largest network that jaxft has needs 5 GB
TIMEOUT_SECONDS = 10.0  # of requests for metadata; HF_HUB_DOWNLOAD_TIMEOUT is that of downloads
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def is_name(source: str) -> bool:
    """Returns whether a source of weights is a name on the Hub: hf:..., but not a URL."""
    return source.startswith(PREFIX) and not source.startswith(f"{PREFIX}//")


def is_id(text: str) -> bool:
    """Returns whether a text has the form OWNER/NAME of a repository."""
    return _ID.fullmatch(text) is not None


class Repository(NamedTuple):
    """A repository on the Hub at a branch, tag or commit."""

    id: str  # OWNER/NAME
    revision: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.id}" + (f"@{self.revision}" if self.revision != "main" else "")


def parse(source: str) -> tuple[Repository, str]:
    """Splits hf:OWNER/NAME[@REVISION][#NETWORK]. NETWORK, '' by default, selects one of several in a file.

    Raises UserError if it has another form.
    """
    place, _, network = source.removeprefix(PREFIX).partition("#")
    identity, at, revision = place.partition("@")
    if not is_id(identity) or (at and not revision):
        raise UserError(f"{excerpt(source, 100)} does not have the form hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return Repository(identity, revision or "main"), network


class Commit(NamedTuple):
    """A revision's current commit; the one that was fetched last if the Hub is out of reach."""

    hash: str
    online: bool  # the Hub has answered


def find_commit(repository: Repository) -> Commit:
    """Asks the Hub, or its cache if the Hub is out of reach, for the commit of the repository's revision.

    Raises UserError if there is no such repository, or if it is neither reachable nor in the cache.
    """
    import huggingface_hub as hub

    with _translated(repository):
        try:
            url = hub.hf_hub_url(repository.id, CONFIG, revision=repository.revision)
            found = hub.get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS)
        except Exception as error:
            if not _is_out_of_reach(error):
                raise
            return Commit(_cached_commit(repository, error), online=False)
    commit = found.commit_hash or ""
    if not re.fullmatch("[0-9a-f]{40,64}", commit):
        raise UserError(f"{_endpoint()} does not answer as the Hugging Face Hub does; check HF_ENDPOINT and the proxy")
    if (found.size or 0) > MAX_CONFIG:
        raise UserError(f"the {CONFIG} of {repository} has {found.size:,} bytes, so it is not timm's or transformers'")
    return Commit(commit, online=True)


def _cached_commit(repository: Repository, error: Exception) -> str:
    """Returns the commit that was fetched last. Raises UserError if there is none; `error` says why it is needed."""
    import huggingface_hub as hub

    try:
        config = hub.hf_hub_download(repository.id, CONFIG, revision=repository.revision, local_files_only=True)
    except hub.errors.LocalEntryNotFoundError:
        raise UserError(f"{repository} is not in {hub.constants.HF_HUB_CACHE}, and {_out_of_reach(error)}") from None
    commit = Path(config).parent.name
    if is_main_process() and not hub.constants.HF_HUB_OFFLINE:
        cause = f"{_endpoint()} is out of reach ({_cause(error)})"
        write_message(f"{cause}; {repository} is commit {commit[:12]} in the cache")
    return commit


def fetch(repository: Repository, commit: Commit) -> Path:
    """Returns the weights file, or its index, in the Hub's cache, with the files that belong to it beside it.

    They are config.json, which is checked first, preprocessor_config.json if there is one, and the shards of an index.
    Raises UserError if they cannot be fetched, or if the network is not one of jaxft's.
    """
    with _translated(repository):
        # by revision, so that the cache keeps the commit of a branch
        config = _download(repository, CONFIG, repository.revision if commit.online else commit.hash)
        revision = config.parent.name
        _check_config(repository, read_small_json(config))
        sizes = _sizes(repository, revision) if commit.online else _cached_sizes(config.parent)
        names = _choose(repository, revision, sizes, commit.online)
        if 0 < sizes.get(PREPROCESSOR, 0) <= MAX_CONFIG:
            names.append(PREPROCESSOR)
        if (size := sum(sizes[name] for name in names)) > MAX_BYTES:
            raise UserError(f"{repository} has {size:,} bytes of weights; jaxft's networks need at most {MAX_BYTES:,}")
        weights, *_ = (_download(repository, name, revision) for name in names)
    return weights


def _choose(repository: Repository, commit: str, sizes: Mapping[str, int], online: bool) -> list[str]:
    """Returns the names of the weights file, or of the index and its shards. Raises UserError if there is none."""
    weights = next((name for name in WEIGHTS if name in sizes), None)
    if weights is None:
        if not online:
            raise UserError(f"{repository} is in the cache without its weights, and {_endpoint()} is out of reach")
        held = [excerpt(name, 40) for name in sizes if name.endswith(_OTHER_WEIGHTS)]
        holds = f"it holds {shortened(held)}" if held else "it holds no weights"
        raise UserError(f"{repository} has neither {WEIGHTS[0]} nor {WEIGHTS[2]}, whole or in shards: {holds}")
    if not weights.endswith(".json"):
        return [weights]
    if sizes[weights] > MAX_INDEX:
        raise UserError(f"the {weights} of {repository} has {sizes[weights]:,} bytes, more than an index needs")
    shards = sorted({*read_index(_download(repository, weights, commit)).values()})
    if absent := [excerpt(name, 60) for name in shards if name not in sizes]:
        where = "" if online else f" in the cache, and {_endpoint()} is out of reach"
        raise UserError(f"{repository} lacks {shortened(absent)}{where}, which its {weights} names")
    return [weights, *shards]


def _check_config(repository: Repository, config: Mapping[str, Any]) -> None:
    """Raises UserError unless the config is of a network of one of the families, before its weights are fetched."""
    if any(describes(config, family.declarations) for family in FAMILIES):
        return
    names = ", ".join(family.name for family in FAMILIES)
    kind = config.get("architecture", config.get("model_type"))
    if kind is None:
        raise UserError(f"the {CONFIG} of {repository} is neither timm's nor transformers'; jaxft reads {names}")
    raise UserError(f"{repository} is a {excerpt(kind, 40)}, which jaxft does not have; its families are {names}")


def _sizes(repository: Repository, commit: str) -> dict[str, int]:
    """Returns {file: bytes} of the repository at a commit."""
    import huggingface_hub as hub

    info = hub.HfApi().model_info(repository.id, revision=commit, files_metadata=True, timeout=TIMEOUT_SECONDS)
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _cached_sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def _download(repository: Repository, file: str, revision: str) -> Path:
    """Returns a file in the Hub's cache; downloads it unless the revision is a commit and the file is cached."""
    import huggingface_hub as hub

    return Path(hub.hf_hub_download(repository.id, file, revision=revision))


# ---- errors ----


def _endpoint() -> str:
    import huggingface_hub as hub

    return excerpt(hub.constants.ENDPOINT, 60)


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_unauthorized(error: Exception) -> bool:
    """Returns whether a token is missing; the Hub also answers so if there is no such repository."""
    return _status(error) == 401 and "Invalid credentials" not in str(error)


def _is_out_of_reach(error: Exception) -> bool:
    """Returns whether the Hub did not answer, or answered that it has a problem."""
    import huggingface_hub as hub

    if isinstance(error, hub.errors.HfHubHTTPError):
        status = _status(error) or 0
        return status >= 500 or status in (408, 429)
    return not isinstance(error, UserError | ValueError)  # the HTTP client's own, of httpx or httpx2 by version


def _cause(error: Exception) -> str:
    if status := _status(error):
        return f"HTTP status {status}"
    return excerpt(" ".join(str(error).split()) or type(error).__name__, 80)


def _out_of_reach(error: Exception) -> str:
    import huggingface_hub as hub

    if hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it, or fetch it on another machine and copy the cache"
    return f"{_endpoint()} is out of reach ({_cause(error)}); try again, or copy the cache of a machine that has it"


@contextmanager
def _translated(repository: Repository) -> Iterator[None]:
    """Turns the Hub's errors into a UserError of one line, without the library's own lines about each try."""
    import huggingface_hub.errors as hub

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        yield
    except UserError:
        raise
    except Exception as error:
        page, login = f"{_endpoint()}/{repository.id}", "`hf auth login`, or set HF_TOKEN"
        if isinstance(error, hub.LocalEntryNotFoundError):  # the Hub was in reach until then
            text = f"{page}: {_out_of_reach(error.__cause__ if isinstance(error.__cause__, Exception) else error)}"
        elif isinstance(error, hub.GatedRepoError):
            text = f"{page} is gated: accept its conditions there, then {login} to a token of that account"
        elif isinstance(error, hub.RepositoryNotFoundError) or _is_unauthorized(error):
            text = f"there is no {page}, or it is private: check the name; for a private one {login}"
        elif isinstance(error, hub.RevisionNotFoundError):
            text = f"{page} has no revision {excerpt(repository.revision, 40)!r}; name a branch, tag or commit after @"
        elif isinstance(error, hub.EntryNotFoundError):
            text = f"{page} has no {CONFIG} of timm or transformers; fetch its weights file yourself, and give that"
        elif isinstance(error, hub.HfHubHTTPError):
            remedy = f"the token is not accepted; {login}" if _status(error) in (401, 403) else "try again later"
            text = f"{page}: HTTP status {_status(error)}; {remedy}"
        elif isinstance(error, hub.HFValidationError):
            text = f"{repository} cannot be the name of a repository on the Hub; give hf:OWNER/NAME"
        elif isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            text = f"{_cache()} cannot be written: {reason(error)}; free some space, or name another cache with HF_HOME"
        else:
            text = f"{page} could not be fetched ({_cause(error)}); run the same command again"
        raise UserError(text) from error
    finally:
        logger.setLevel(level)


def _cache() -> str:
    import huggingface_hub as hub

    return hub.constants.HF_HUB_CACHE
