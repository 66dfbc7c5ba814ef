"""Matrices that share an input: found where an earlier run left them, or settled and kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from k2quant.calib.solving.choosing import settle
from k2quant.calib.solving.evidence import Evidence
from k2quant.calib.solving.passing.sinks import Sink
from k2quant.calib.solving.settings import Settings
from k2quant.errors import BadValue
from k2quant.kernels.codecs.values import ValueAt


class Groups:
    """What is to be solved of a layer, and where it goes."""

    def __init__(self, layer: int, bases: Collection[str], settings: Settings, sink: Sink) -> None:
        """Keep what decides.

        Args:
            layer: its number.
            bases: of the matrices that are solved, of this layer and of others.
            settings: how they are.
            sink: where they go.
        """
        self._layer, self._bases, self._settings, self._sink = layer, bases, settings, sink

    def wanted(self, above: str, names: Sequence[str]) -> list[str]:
        """Return which projections of a module are solved."""
        return [name for name in names if f"{above}.{name}" in self._bases]

    def stand(self, above: str, names: Sequence[str]) -> bool:
        """Tell whether all of those stand already."""
        return self._found(above, self.wanted(above, names)) is not None

    def _found(self, above: str, wanted: Sequence[str]) -> dict[str, Tensor] | None:
        found: dict[str, Tensor] = {}
        for name in wanted:
            values = self._sink.find(f"{above}.{name}")
            if values is None:
                return None
            found[name] = values
        return found

    def values(self, above: str, weights: Mapping[str, Tensor], evidence: Callable[[], Evidence]) -> dict[str, Tensor]:
        """Return what projections that share an input ship with, BF16 `[R, K]` by name; those not solved as they are.

        Args:
            above: the module that has them.
            weights: as the source has them.
            evidence: gives what is known of their input; not called where nothing is left to solve.

        Raises:
            BadValue: on a CPU, a weight is not finite.
        """
        wanted = self.wanted(above, list(weights))
        found = self._found(above, wanted)
        if found is None:
            try:
                settled = settle({name: weights[name] for name in wanted}, evidence(), self._settings)
            except ValueAt as error:
                bad = next(name for name in wanted if not weights[name].isfinite().all())
                raise BadValue(str(error), tensor=f"{above}.{bad}.weight") from error
            self._sink.put(self._layer, {f"{above}.{name}": each for name, each in settled.items()})
            found = {name: each.values for name, each in settled.items()}
        return {name: found[name].to(each.device) if name in found else each for name, each in weights.items()}
