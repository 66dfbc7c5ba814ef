"""`Pass`: the rows of the data through a checkpoint, each layer solved before the next one sees what it gives.

After each layer its hidden states are whole: a pass that is stopped goes on there. The layer that it was in is run
again, and what its sink holds of it is not solved again but used as it is, so that everything after has equal bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from k2quant.calib.collecting.attention import IMPLEMENTATION
from k2quant.calib.collecting.pieces import segments
from k2quant.calib.collecting.running import check_room, check_tokens
from k2quant.calib.collecting.walking import Rows
from k2quant.calib.solving.memory import Needs, needs
from k2quant.calib.solving.passing.groups import Groups
from k2quant.calib.solving.passing.layers import Kept, LayerRun, Modules
from k2quant.calib.solving.passing.records import LayerFacts, read_record, write_record
from k2quant.calib.solving.passing.room import Room
from k2quant.calib.solving.passing.sinks import Sink
from k2quant.calib.solving.settings import Settings
from k2quant.calib.stats.digests import Digests
from k2quant.calib.stats.layout import PARTS, place_of
from k2quant.calib.stats.manifest import canonical
from k2quant.calib.stats.model import Model
from k2quant.checkpoint.files.paths import as_output_error
from k2quant.checkpoint.reader import Checkpoint
from k2quant.errors import DestinationForeign, UsageError
from k2quant.ground import names
from k2quant.ground.saying.showing import brief
from k2quant.ground.version import __version__
from k2quant.kernels.devices.precision import whole_float32
from k2quant.model.loading import assemble
from k2quant.model.passes.activations import Activations
from k2quant.model.placement import execution_device

if TYPE_CHECKING:
    from k2quant.calib.inputs import Samples
    from k2quant.ground.saying.progress import Progress

_HIDDEN, _TOKENS, _RECORDS = "states", "tokens", "layers"
"""Below the folder that a pass works in: hidden states, what is kept of a layer's tokens, notes of layers."""


class Pass:
    """A checkpoint on its way through, layer by layer."""

    def __init__(
        self,
        source: Checkpoint,
        samples: Samples,
        bases: Collection[str],
        settings: Settings,
        *,
        sink: Sink,
        work: Path,
        memory: int,
        device: str | torch.device = "cpu",
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Begin, or take up what an earlier pass over the same left.

        The same samples on the same machine give the same bits, whatever `memory` and `workers`, and after any number
        of kills. Another device, CPU or number of threads of torch may change the last bits of a product.

        Args:
            source: the checkpoint, in any format.
            samples: rows of tokens; `train` decides, `validation` judges.
            bases: the matrices that are solved, by their names in the language model without suffix; projections of
                decoder layers, with columns a multiple of 32. All other weights are as the source has them.
            settings: how they are solved.
            sink: where they go.
            work: folder for hidden states; the caller has it locked.
            memory: bytes that the pass may take.
            device: where layers compute.
            workers: routed experts that are solved at a time; None: as many as there are cores.
            progress: called with tokens times layers that are done, and all.

        Raises:
            UsageError: `memory` is too small, a token is none of the model's, or a matrix lies in none of its layers.
            CheckpointError: the checkpoint is no model, or cannot be read.
            DestinationForeign: a link stands where it would write.
            DestinationStale: the folder holds a pass over something else.
            MalformedFile: it holds what no pass leaves.
            OutputError: the disk is full or fails.
        """
        for name in (_HIDDEN, _TOKENS, _RECORDS):
            if (work / name).is_symlink():
                raise DestinationForeign("a link where k2quant keeps its pass", file=work / name, remedy="remove it")
        counts = [len(getattr(samples, part).tokens) for part in PARTS]
        model, place = Model.of(source.config), execution_device(device)
        self.needs: Needs = needs(
            source,
            rows=counts,
            length=samples.train.tokens.shape[1],
            bases=bases,
            memory=memory,
            workers=workers,
        )
        """What it takes."""
        check_tokens(samples, source)
        _check_bases(bases, model)
        assembly = assemble(source, device=place, dtype=torch.bfloat16, backend="decoded")
        assembly.make_dense()
        if place.type == "cpu":
            assembly.model.set_attn_implementation(IMPLEMENTATION)
        self._rows = Rows(assembly, model, segments(samples))
        self._bases, self._settings, self._sink, self._progress = frozenset(bases), settings, sink, progress
        self._work = work
        self._room = Room(work / _TOKENS, self.needs.kept)
        self._kept: Kept | None = None
        self._digests: Digests = {}
        self._facts: list[LayerFacts] = []
        self._hidden = self._opened(samples)
        for layer in range(self.next):
            self._take_up(layer)
        if self._hidden.finished < 0:
            check_room(work, self.needs.disk, "hidden states between two layers, and tokens of one")

    @property
    def next(self) -> int:
        """The layer that comes next; as many as there are when all are through."""
        return max(self._hidden.finished, 0)

    @property
    def layers(self) -> int:
        """How many there are."""
        return self._rows.model.layers

    @property
    def facts(self) -> tuple[LayerFacts, ...]:
        """What was found of each layer that is through, those of earlier runs too."""
        return tuple(self._facts)

    @property
    def digests(self) -> Mapping[str, Mapping[str, str]]:
        """crc32 by suffix of the source's weights that were read and solved, by base.

        Those of a matrix stand there before the sink hears of it; those of layers that an earlier run did, too.
        """
        return self._digests

    def __repr__(self) -> str:
        """Return it in one line."""
        return f"Pass(layer {self.next} of {self.layers}, {len(self._bases):,} matrices, {brief(self.needs)})"

    @torch.no_grad()
    def advance(self) -> LayerFacts:
        """Solve the next layer; afterwards its hidden states are whole.

        Raises:
            IndexError: all layers are through.
            BadValue: what goes into a matrix is not finite.
            CheckpointError: the checkpoint cannot be read.
            OutputError: the disk is full or fails.
        """
        number = self.next
        if number >= self.layers:
            msg = f"all {self.layers} layers are through"
            raise IndexError(msg)
        with whole_float32(), as_output_error(self._work):
            if self._hidden.finished < 0:
                self._rows.embed(self._hidden)
            found = self._run(number)
            own = {base: each for base, each in self._digests.items() if names.layer(f"{base}.") == number}
            write_record(self._records, found, own)
            self._hidden.finish(number + 1)
        self._facts.append(found)
        return found

    def clear(self) -> None:
        """Remove what the pass has on the disk; it is through."""
        self._hidden.clear()
        self._room.clear()

    def _run(self, number: int) -> LayerFacts:
        solved = sum(names.layer(f"{base}.") == number for base in self._bases)
        run = LayerRun(
            self._rows,
            number,
            self._hidden,
            self._tokens(),
            Groups(number, self._bases, self._settings, self._sink),
            propagate=self._settings.propagate,
            workers=self.needs.workers,
            digest=self._note,
            tell=lambda share: self._tell(number, share),
        )
        measured = run.go()
        self._tell(number, 1.0)
        relative = measured.relative if solved else None
        return LayerFacts(layer=number, solved=solved, relative=relative, tokens=measured.tokens)

    def _note(self, modules: Modules) -> None:
        self._digests.update(self._rows.digests((name, module) for name, module in modules if name in self._bases))

    def _tell(self, number: int, share: float) -> None:
        if self._progress:
            tokens = self._rows.tokens
            self._progress(number * tokens + int(share * tokens), self.layers * tokens)

    def _tokens(self) -> Kept:
        """Return room for what is kept of a layer's tokens, in the order of `kept_of_tokens`; each layer uses it."""
        if self._kept is None:
            shape = self._rows.tokens, self._rows.model.hidden
            held = sum(piece.size for piece in self._rows.pieces if piece.part == "validation")
            self._kept = Kept(
                x=self._room.tensor("x", shape, torch.bfloat16),
                out=self._room.tensor("out", shape, torch.float32),
                residual=self._room.tensor("residual", shape, torch.bfloat16),
                aside=self._room.tensor("aside", (held, shape[1]), torch.float32),
            )
        return self._kept

    @property
    def _records(self) -> Path:
        return self._work / _RECORDS

    def _take_up(self, layer: int) -> None:
        facts, digests = read_record(self._records, layer)
        self._facts.append(facts)
        self._digests.update(digests)

    def _opened(self, samples: Samples) -> Activations:
        about = {
            "data": {part: getattr(samples, part).digest for part in PARTS},
            "settings": self._settings.as_json(),
            "matrices": sorted(self._bases),
        }
        identity = {
            "solving": hashlib.sha256(canonical(about)).hexdigest(),
            "version": __version__,
            "embedding": self._rows.embedded(),
        }
        folder = self._work / _HIDDEN
        with as_output_error(self._work):
            folder.mkdir(parents=True, exist_ok=True)
            self._records.mkdir(exist_ok=True)
        return Activations(
            folder, self._rows.shapes, torch.bfloat16, budget=self.needs.budget, identity=identity, lasting=True
        )


def _check_bases(bases: Collection[str], model: Model) -> None:
    """Refuse a matrix that no layer would come to: nobody should wait for it until the end."""
    for base in bases:
        place = place_of(base)
        if place is None or place.layer >= model.layers:
            raise UsageError(f"{base}: expected a projection of one of {model.layers} decoder layers")
