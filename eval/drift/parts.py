"""The folder in which the parts of one measurement meet: tasks of a job array, each of which measures some batches.

Each batch has a file of its own, so any part does what another left, and another N takes over what is finished. Who
finds all of them there completes: the result is written, and the batches go. To begin, to look and to complete, parts
go one by one behind a gate.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import PARTIAL, as_output_error, partial_of, read_limited, write_whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.writing.destination import attempt_at
from k2quant.checkpoint.writing.sharing import Sharing
from k2quant.conversion.spreading.part import Part
from k2quant.errors import DestinationForeign, DestinationStale, K2QuantError, MalformedFile
from k2quant.eval.drift.batches import Layout, Measured, load, save
from k2quant.eval.drift.findings import Fidelity
from k2quant.eval.drift.reading import read_fidelity
from k2quant.eval.runs.folder import as_json, difference
from k2quant.eval.runs.identity import digest

RUN = "k2quant_fidelity.json"
"""The file that says what is measured."""
RESULT = "result.json"
"""What came out, once all batches were there; as `k2quant eval fidelity -o` writes it."""

_LIMIT = 2**20  # bytes of what is asked
_OWN = re.compile(
    rf"(k2quant_fidelity\.json|result\.json|batch-[0-9]{{6,}}\.safetensors)([.0-9a-z-]*{re.escape(PARTIAL)})?"
    r"|(lock|gate|share-[0-9]+-of-[0-9]+)(\.soft)?(\.taking)?"
)


class Parts:
    """What one part does in the folder."""

    def __init__(self, folder: Path, part: Part, identity: Mapping[str, Any], *, soft_lock: bool) -> None:
        """Prepare, without touching anything; see `meeting`."""
        self._folder, self._identity = folder, identity
        self._run, self._attempt = bytes.fromhex(digest(identity)), attempt_at(part.name)
        self._mine = f"*.{part.name}-*{PARTIAL}"
        self._sharing = Sharing(folder, folder=folder, name=part.name, soft=soft_lock, check=self._check)

    def begin(self) -> None:
        """Take part; see `meeting` for what is raised."""
        with as_output_error(self._folder):
            if self._folder.is_dir():
                foreign = sorted(path.name for path in self._folder.iterdir() if not _OWN.fullmatch(path.name))
                if foreign and not (self._folder / RUN).is_file():
                    message, found = "not empty, and no measurement of k2quant", ", ".join(foreign[:5])
                    raise DestinationForeign(message, file=self._folder, found=found, remedy="name another one")
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._sharing.alone():
                pass

    def _check(self) -> None:
        """Note what is measured, or refuse to go on with something else."""
        for path in self._folder.glob(self._mine):  # of an earlier attempt at this part
            path.unlink(missing_ok=True)
        noted = self._noted()
        if noted is not None and not self._is_ours(noted) and self.result() is None:
            raise DestinationStale(
                "parts of another measurement",
                file=self._folder,
                found=difference(noted.get("asks"), self._identity),
                remedy="name another file for the result, or delete this folder",
            )
        if noted is None or not self._is_ours(noted):
            self._clear()
            record = {"identity": self._run.hex(), "asks": self._identity}
            write_whole(self._folder / RUN, as_json(record), self._attempt)

    def _noted(self) -> dict[str, Any] | None:
        path = self._folder / RUN
        try:
            return parse_object(read_limited(path, _LIMIT), file=path)
        except FileNotFoundError:
            return None
        except MalformedFile as error:
            remedy = "delete the folder that it lies in"
            raise MalformedFile("does not say what is measured", file=path, found=error.found, remedy=remedy) from error

    def _is_ours(self, noted: Mapping[str, Any]) -> bool:
        return noted.get("identity") == self._run.hex()

    def _clear(self) -> None:
        """Delete what other parts left; what says whose it is goes before the result, which alone says nothing."""
        self._drop_batches()
        for name in (RUN, RESULT):
            (self._folder / name).unlink(missing_ok=True)

    def _drop_batches(self) -> None:
        for path in self._folder.glob("batch-*"):
            path.unlink(missing_ok=True)

    def result(self) -> Fidelity | None:
        """Return what came out; None where it is still to come.

        Raises:
            MalformedResults: the file holds something else.
        """
        path = self._folder / RESULT
        return read_fidelity(path) if path.exists() else None

    def standing(self, number: int, layout: Layout) -> bool:
        """Tell whether a batch was measured.

        Raises:
            MalformedFile: its file is damaged, or another run's.
        """
        path = self._path(number)
        if path.exists():
            load(path, layout, run=self._run)
            return True
        return False

    def put(self, number: int, measured: Measured, layout: Layout) -> None:
        """Keep what was measured of a batch, whole and on the disk.

        Raises:
            DestinationStale: the folder is not there any more.
            OutputError: it cannot be written.
        """
        try:
            with as_output_error(self._folder):
                save(self._path(number), measured, layout, run=self._run, attempt=self._attempt)
        except K2QuantError:
            if self._folder.is_dir():
                raise
            raise self._emptied() from None

    def gathered(self, layouts: Sequence[Layout]) -> tuple[list[Measured], tuple[int, ...]]:
        """Return all batches if they are there; else none, and the numbers of those that are still to come.

        Raises:
            DestinationStale: the folder was emptied, or is another run's now.
            MalformedFile: a file is damaged, or another run's.
        """
        with self._sharing.alone():
            self._look_again()
            noted = self._noted()
            if noted is None or not self._is_ours(noted):
                raise self._emptied()
            missing = tuple(number for number in range(len(layouts)) if not self._path(number).exists())
            if missing:
                return [], missing
            return [load(self._path(number), layout, run=self._run) for number, layout in enumerate(layouts)], ()

    def _look_again(self) -> None:
        """Have what others have just written be seen: NFS shows a folder anew to a machine that changes it."""
        probe = partial_of(self._folder / RUN, self._attempt)
        with as_output_error(self._folder):
            probe.touch()
            probe.unlink()

    def _emptied(self) -> DestinationStale:
        remedy = "run the same command again: it says how things stand"
        return DestinationStale("was emptied while this part was measured", file=self._folder, remedy=remedy)

    def finish(self, result: Fidelity) -> None:
        """Write the result; then the batches may go.

        Raises:
            OutputError: it cannot be written.
        """
        with as_output_error(self._folder), self._sharing.alone():
            data = json.dumps(result.as_dict(), indent=1).encode() + b"\n"
            write_whole(self._folder / RESULT, data, self._attempt)
            self._drop_batches()

    def leave(self) -> None:
        """Let others have this part; the last one takes away what nobody needs any more."""
        if self._sharing.held:
            with contextlib.suppress(OSError, K2QuantError):
                self._go_home()
            self._sharing.release()

    def _go_home(self) -> None:
        with self._sharing.alone():
            noted, over = self._noted(), (self._folder / RESULT).exists()
            begun = any(self._folder.glob("batch-*"))
            if noted is None or not self._is_ours(noted) or (begun and not over) or not self._sharing.is_last():
                return
            kept = {RUN, RESULT} if over else set()
            for path in self._folder.iterdir():
                if path.name not in kept and _OWN.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            if not kept:
                self._folder.rmdir()

    def _path(self, number: int) -> Path:
        return self._folder / f"batch-{number:06}.safetensors"


@contextlib.contextmanager
def meeting(folder: Path, part: Part, identity: Mapping[str, Any], *, soft_lock: bool) -> Iterator[Parts]:
    """Take part in a measurement as long as the block runs.

    Args:
        folder: that all parts see; made if need be.
        part: which one this is. Nobody else may do it meanwhile.
        identity: all that the measurement depends on.
        soft_lock: whether a file may be the lock where the file system has no others.

    Raises:
        DestinationForeign: the folder holds something else.
        DestinationInUse: another process does this part.
        DestinationStale: other parts measure something else there.
        MalformedFile: the folder's own files are damaged.
        OutputError: it cannot be written.
    """
    parts = Parts(folder, part, identity, soft_lock=soft_lock)
    try:
        parts.begin()
        yield parts
    finally:
        parts.leave()
