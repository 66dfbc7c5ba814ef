"""Every codec on the GPU against its reference in plain torch: equal, or where it first differs, with both values."""

from __future__ import annotations

from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from k2quant.kernels.codecs.reference.seam import torch_codecs
from suites.fp4 import gpu_cases as fp4_cases
from suites.gpu.bit_cases import Arrays, Bench, Case, cases
from suites.gpu.running import ahead, record
from suites.gpu.running.record import Entry, Record
from suites.gpu.running.stages import Setting
from suites.products.run import gpu_lost

SUMS = 1e-12
"""Relative difference that sums of figures may have."""

DRY = {"every": 509, "ragged": (25, 160), "matrix": (136, 256)}
"""What a dry run takes: a few values, and small matrices."""
DRY_STEP = 7
"""And of all cases each so many-th; a kind of weights has six, so that every codec has its turn."""


def run(kept: Record, setting: Setting) -> None:
    """Compare everything."""
    from k2quant.kernels.codecs.gpu.seam import cuda_codecs

    device = torch.device(setting.device)
    sizes: dict[str, Any] = DRY if setting.dry_run else {}
    bench = Bench(cuda_codecs(setting.device), torch_codecs("cpu"), device, **sizes)
    every = chain(cases(bench), fp4_cases.cases(bench))
    chosen = list(islice(every, 0, None, DRY_STEP if setting.dry_run else 1))
    if not (setting.dry_run or kept.resumed):
        ahead.run([case.ours for case in chosen])
    for case in chosen:
        kept.attempt(case.name, partial(compare, case), fatal=gpu_lost)


def compare(case: Case) -> Entry:
    """Run a case on both sides and hold ours to the truth."""
    truth, ours = case.truth(), case.ours()
    wrong = differences(ours, truth)
    count = int(sum(each.size for each in truth.values()))
    if wrong:
        return {"outcome": record.MISSED, "said": "; ".join(wrong), "elements": count}
    return {"outcome": record.PASSED, "said": f"{count} elements equal", "elements": count}


def differences(ours: Arrays, truth: Arrays) -> list[str]:
    """Return a sentence for each array that differs."""
    if ours.keys() != truth.keys() and not {"refused"} & (ours.keys() | truth.keys()):
        first = min(ours.keys() ^ truth.keys())
        return [f"{first}: {'missing' if first in truth else 'not expected'}"]
    if ours.keys() != truth.keys():
        return [f"expected {_shown(truth)}, found {_shown(ours)}"]
    found = [difference(name, ours[name], wanted) for name, wanted in truth.items()]
    return [sentence for sentence in found if sentence]


def difference(name: str, ours: NDArray[Any], truth: NDArray[Any]) -> str:
    """Return how an array differs: its first element that does, with both values; empty if it does not."""
    if (ours.shape, ours.dtype) != (truth.shape, truth.dtype):
        return f"{name}: expected {truth.dtype} {truth.shape}, found {ours.dtype} {ours.shape}"
    if name.endswith("refused"):
        return "" if ours.tobytes() == truth.tobytes() else f"expected {_text(truth)}, found {_text(ours)}"
    if name.endswith("sums"):
        off = np.abs(ours - truth) > SUMS * np.abs(truth)
    else:
        one, other = (each.view(f"u{each.itemsize}") for each in (ours, truth))
        off = one != other
    if not off.any():
        return ""
    place = np.unravel_index(int(np.argmax(off)), off.shape)
    where = ", ".join(map(str, place))
    return f"{name}[{where}]: expected {_value(truth[place])}, found {_value(ours[place])}; {int(off.sum())} differ"


def _shown(arrays: Arrays) -> str:
    return _text(arrays["refused"]) if "refused" in arrays else "a result"


def _text(sentence: NDArray[Any]) -> str:
    return f"the refusal `{sentence.tobytes().decode()}`" if sentence.size else "no refusal"


def _value(value: Any) -> str:
    """Show an element: bits of integers, floats as they are."""
    return f"{value:#x}" if isinstance(value, np.unsignedinteger) else str(value)
