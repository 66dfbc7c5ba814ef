"""Who was asked what: hashes over the content of models, tokenizers, tasks and requests, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from k2quant.checkpoint.beside import of_tokenizer
from k2quant.checkpoint.files.digests import file_digest
from k2quant.checkpoint.files.paths import inside, read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import MalformedFile, MissingTensor
from k2quant.ground import pool

_log = logging.getLogger(__name__)
_THREADS = 8
_INDEX = "model.safetensors.index.json"
_INDEX_LIMIT = 2**28  # bytes; that of Kimi K2 has 20 MB
_WHERE_DATA_LIES = ("custom_dataset", "dataset_path", "dataset_kwargs", "metadata")


def model_hash(
    folder: Path,
    *,
    follow_links: bool = False,
    reread: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Return the SHA-256, in hex, of a model's config, generation config and shards: of their names and every byte.

    Times, the folder's name and place, links and other files beside them play no part. A file whose digest was noted
    when it was read or converted, and that stands unchanged since, is not read again: see `checkpoint.files.digests`.

    Args:
        folder: of a checkpoint in safetensors.
        follow_links: whether its links may lead out of it.
        reread: whether to read every byte whatever was noted.
        progress: called with the bytes read and all bytes.

    Raises:
        MissingTensor: a shard that the index names is not there, or there is none at all.
        CheckpointError: the index does not parse, or a name or link leaves the folder.
    """
    names = [name for name in ("config.json", "generation_config.json") if (folder / name).exists()]
    here = partial(inside, folder, follow_links=follow_links)
    return _content_hash([here(name) for name in (*names, *_shards(folder, here))], progress, reread=reread)


def tokenizer_hash(folder: Path, *, follow_links: bool = False) -> str | None:
    """Return the SHA-256, in hex, of a tokenizer's files, chat templates and code included; None where there are none.

    Args:
        folder: where they lie.
        follow_links: whether its links may lead out of it.

    Raises:
        CheckpointError: a link leaves the folder.
    """
    names = [entry.name for entry in folder.iterdir() if of_tokenizer(entry.name) and entry.is_file()]
    paths = [inside(folder, name, follow_links=follow_links) for name in names]
    return _content_hash(paths, None, reread=True) if paths else None


def task_hash(config: Mapping[str, Any], docs: Iterable[Any]) -> str:
    """Return the SHA-256, in hex, of a task: its settings, without where its data lie, and its documents in order.

    Args:
        config: as lm-eval dumps it.
        docs: the documents that are asked.
    """
    metadata = config.get("metadata")
    version = metadata.get("version") if isinstance(metadata, Mapping) else None
    settings = {key: value for key, value in config.items() if key not in _WHERE_DATA_LIES}
    digests = [digest(doc) for doc in docs]
    return digest([settings, version, digests])


def seed_of(*content: Any) -> int:
    """Return a seed that follows from some content, 0 to 2^31 - 1: what every server takes.

    Items have seeds of their own by it: drawn with one seed, all would fall to the same side of their chances, and
    would not be independent items.
    """
    return int(digest(content)[:16], 16) % 2**31


def digest(value: Any) -> str:
    """Return the SHA-256, in hex, of a JSON-like value; the order of keys plays no part, of lists it does."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=_name)
    return hashlib.sha256(text.encode()).hexdigest()


def _name(value: object) -> str:
    """Return what stays the same of a value that is no JSON: a function by its name, not by its address."""
    return str(getattr(value, "__qualname__", value))


def _shards(folder: Path, here: Callable[[str], Path]) -> list[str]:
    if (folder / _INDEX).exists():
        path = here(_INDEX)
        shards = parse_object(read_limited(path, _INDEX_LIMIT), file=path).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise MalformedFile("no map of weights", file=path, expected="weight_map: {tensor: shard}")
        names = sorted(set(shards.values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise MissingTensor("no safetensors", file=folder, remedy="is this the folder of a model?")
    return names


def _content_hash(paths: list[Path], progress: Callable[[int, int], None] | None, *, reread: bool) -> str:
    counter = _Counter(progress)
    digests: dict[str, str] = {}
    noted: list[Path] = []

    def read(path: Path) -> None:
        digests[path.name], known = file_digest(path, reread=reread, add=counter.add)
        if known:
            noted.append(path)

    try:
        counter.total = sum(path.stat().st_size for path in paths)
        pool.run(iter(paths), read, workers=min(_THREADS, len(paths), os.cpu_count() or 1), tick=counter.show)
        counter.show()
    except FileNotFoundError as error:
        raise MissingTensor("a file of the model is not there", file=error.filename) from error
    if noted:
        _log.info("%s: unchanged since it was hashed: %d of %d files", paths[0].parent, len(noted), len(paths))
    return digest(digests)


class _Counter:
    """Bytes read by all threads; shown by one of them."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._done = 0
        self.total = 0

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count

    def show(self) -> None:
        if self._progress:
            self._progress(self._done, self.total)
