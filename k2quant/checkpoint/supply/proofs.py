"""What the journal keeps of bytes that were read before they could be proven, and what proves them later.

An output shard's partners may lie in a source shard that another run, or another machine, reads whole. Its record then
says the crc32 of the blocks that it read ("read"), and the record of whoever proved that source shard says what they
are ("proven"). When all records are there, the two are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from k2quant.checkpoint.supply.blocks import BLOCK_BYTES
from k2quant.errors import CheckpointError

Claim = tuple[str, int, int]
"""Source shard, number of a block, its crc32."""


def claims(records: Iterable[Mapping[str, Any]]) -> Iterator[Claim]:
    """Yield all that records say of a source's blocks; what is damaged is passed over."""
    for record in records:
        for kind in ("proven", "read"):
            yield from _claims(record, kind)


def unproven(records: Iterable[Mapping[str, Any]]) -> int:
    """Return the blocks of a source that were read for some output shard, and that nothing proves.

    Args:
        records: of all output shards.

    Raises:
        CheckpointError: one was read as something else than it is.
    """
    known = list(records)
    proven = {(file, number): crc for record in known for file, number, crc in _claims(record, "proven")}
    missing = set()
    for record in known:
        for file, number, crc in _claims(record, "read"):
            expected = proven.get((file, number))
            if expected is None:
                missing.add((file, number))
            elif expected != crc:
                raise CheckpointError(
                    f"gave other bytes to {record.get('shard')} than it holds",
                    file=file,
                    expected=f"crc32 {expected:08x} from byte {number * BLOCK_BYTES:,} on",
                    found=f"{crc:08x}",
                    remedy="write it anew with `restart=True`",
                )
    return len(missing)


def _claims(record: Mapping[str, Any], kind: str) -> Iterator[Claim]:
    fetched = record.get("fetched")
    found = fetched.get(kind) if isinstance(fetched, dict) else None
    for file, blocks in found.items() if isinstance(found, dict) else ():
        for block in blocks if isinstance(blocks, list) else ():
            if isinstance(block, list) and len(block) == 2 and all(type(each) is int for each in block):
                yield file, block[0], block[1]
