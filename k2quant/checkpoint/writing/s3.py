"""Outputs on S3 and what speaks its protocol: uploads in parts that are completed last, sums that the store checks.

Each part goes with its MD5, which the store compares before it takes it; the object's ETag, where the store makes it of
these sums (RFC 1864; AWS, "Checking object integrity"), and its size are compared when it stands. An upload that was
begun and not completed is invisible and is paid for: those of names that we write ourselves are aborted.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

from k2quant.checkpoint.remote.bucket import filesystem_of
from k2quant.checkpoint.remote.pages import objects_below, pages
from k2quant.checkpoint.remote.retrying import Transient, code_of, pause, status_of
from k2quant.checkpoint.remote.secrets import clean
from k2quant.checkpoint.writing.objects import Objects, Upload, explained, pieces_of, read_piece
from k2quant.errors import OutputError
from k2quant.ground import pool

_log = logging.getLogger(__name__)

PART_BYTES = 2**23
"""Bytes of a part, as AWS's own tools have it; at least 5 MiB are asked for (AWS, Multipart upload limits)."""
_MOST_PARTS = 10_000  # the same
_ABREAST = 8  # parts that are under way at a time
_DELETED_AT_ONCE = 1000  # objects of one request (AWS, DeleteObjects)
_PLAIN = {None, "AES256"}  # encryptions with which an ETag is the MD5 of what was sent (AWS, Object)


class S3Objects(Objects):
    """What lies below an `s3://` address."""

    def _opened(self) -> Any:
        """Return a file system of its own that tries once: who asks it tries again, and says so."""
        filesystem = type(filesystem_of(self.address))(skip_instance_cache=True, use_listings_cache=False)
        filesystem.retries = 1
        filesystem.config_kwargs = {"retries": {"total_max_attempts": 1}, **filesystem.config_kwargs}
        return filesystem

    def listed(self, under: str = "") -> dict[str, int]:
        """Return the sizes in bytes of all objects below the prefix, or below a folder of it, by name."""
        above = f"{under}/" if under else ""

        def ask(asked: dict[str, Any]) -> dict[str, Any]:
            return self._asked(under, lambda: self._call("list_objects_v2", **asked))

        with explained(self.named(under)):
            found = objects_below(ask, self._path(under), self.named(under))
            return {above + name: int(facts["size"]) for name, facts in found.items()}

    def size(self, name: str) -> int | None:
        """Return the bytes of an object; None where there is none.

        It is listed, not asked for by HEAD, whose errors say nothing.
        """
        bucket, key = self._key(name)
        found = self._asked(name, lambda: self._call("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1))
        return next((int(each["Size"]) for each in found.get("Contents") or [] if each["Key"] == key), None)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small object if none stands there; see `Objects.create`.

        Stores that came before conditional writes (2024) refuse the condition, or pass over it: whoever calls reads
        again what stands there.
        """
        bucket, key = self._key(name)

        def ask() -> bool:
            if self.size(name) is not None:
                return False
            try:
                self._call("put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", **_sum(data))
            except OSError as error:
                if isinstance(error, FileExistsError) or status_of(error) == 412:
                    return False
                if status_of(error) == 409:  # somebody else writes it at this moment
                    raise Transient("a conflict of two writers") from None
                if status_of(error) != 501 and code_of(error) != "NotImplemented":
                    raise
                self._call("put_object", Bucket=bucket, Key=key, Body=data, **_sum(data))
                pause(1.0)  # for another that does the same: the later one stays
            return True

        return self._asked(name, ask)

    def write(self, name: str, data: bytes) -> None:
        """Write a small object."""
        bucket, key = self._key(name)
        self._asked(name, lambda: self._call("put_object", Bucket=bucket, Key=key, Body=data, **_sum(data)))

    def upload(self, name: str, descriptor: int, size: int) -> None:
        """Write an object of any size from an open file, in parts; see `Objects.upload`."""
        if size <= PART_BYTES:
            self.write(name, read_piece(descriptor, 0, size))
        else:
            self._upload(name, descriptor, size)
        self._check(name, size)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are not there are passed over."""
        for first in range(0, len(names), _DELETED_AT_ONCE):
            some = names[first : first + _DELETED_AT_ONCE]
            bucket, _ = self._key("")
            keys = [{"Key": self._key(name)[1]} for name in some]

            def ask(bucket: str = bucket, keys: list[dict[str, str]] = keys) -> dict[str, Any]:
                return self._call("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})

            failed = self._asked(some[0], ask).get("Errors") or []
            if failed:
                found = clean(f"{failed[0].get('Code')}: {failed[0].get('Message')}")[:300]
                raise OutputError("cannot be deleted", file=self.named(some[0]), found=found)

    def uploads(self) -> list[Upload]:
        """Return the uploads below the prefix that were neither completed nor aborted.

        Raises:
            OutputError: they cannot be listed.
        """
        bucket, prefix = self._key("")
        prefix = f"{prefix}/" if prefix else ""
        found: list[Upload] = []

        def ask(after: dict[str, Any]) -> dict[str, Any]:
            asked = {"Bucket": bucket, "Prefix": prefix, **after}
            return self._asked("", lambda: self._call("list_multipart_uploads", **asked))

        markers = {"NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}
        with explained(self.named("")):
            for answer in pages(ask, markers, self.named("")):
                for each in answer.get("Uploads") or []:
                    begun = each.get("Initiated")
                    said = begun.isoformat(timespec="seconds") if hasattr(begun, "isoformat") else ""
                    if each["Key"].startswith(prefix):
                        found.append(Upload(each["Key"].removeprefix(prefix), each["UploadId"], said))
        return found

    def abort(self, uploads: Iterable[Upload]) -> None:
        """End uploads, so that the store forgets their parts; those that are over are passed over."""
        for upload in uploads:
            bucket, key = self._key(upload.name)

            def ask(bucket: str = bucket, key: str = key, number: str = upload.id) -> None:
                try:
                    self._call("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=number)
                except OSError as error:
                    if code_of(error) != "NoSuchUpload":
                        raise

            self._asked(upload.name, ask)

    def _upload(self, name: str, descriptor: int, size: int) -> None:
        bucket, key = self._key(name)
        begun = self._asked(name, lambda: self._call("create_multipart_upload", Bucket=bucket, Key=key))
        upload = Upload(name, begun["UploadId"], "")
        try:
            parts = self._send(upload, descriptor, size)
            self._complete(upload, parts, size)
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong is the error; the next run aborts what is left
                self.abort([upload])
            raise

    def _send(self, upload: Upload, descriptor: int, size: int) -> dict[int, tuple[str, bytes | None]]:
        """Send all parts; return ETag and, where the ETag is that, MD5 of each by number."""
        bucket, key = self._key(upload.name)
        piece = max(PART_BYTES, math.ceil(size / _MOST_PARTS))
        sent: dict[int, tuple[str, bytes | None]] = {}

        def send(part: tuple[int, int, int]) -> None:
            number, start, length = part
            data = read_piece(descriptor, start, length)
            digest = hashlib.md5(data, usedforsecurity=False)
            place = {"Bucket": bucket, "Key": key, "UploadId": upload.id, "PartNumber": number}
            answer = self._asked(upload.name, lambda: self._call("upload_part", **place, Body=data, **_sum(data)))
            tag = str(answer["ETag"])
            plain = answer.get("ServerSideEncryption") in _PLAIN and not answer.get("SSECustomerAlgorithm")
            if plain and len(tag.strip('"')) == 32 and tag.strip('"') != digest.hexdigest():
                raise self._damaged(upload.name, f"part {number} with MD5 {digest.hexdigest()}", tag)
            sent[number] = tag, digest.digest() if tag.strip('"') == digest.hexdigest() else None

        pool.run(pieces_of(size, piece), send, workers=_ABREAST)
        return sent

    def _complete(self, upload: Upload, parts: dict[int, tuple[str, bytes | None]], size: int) -> None:
        """Have the object appear; where the answer was lost and the upload is over, look whether it did."""
        bucket, key = self._key(upload.name)
        listed = [{"PartNumber": number, "ETag": parts[number][0]} for number in sorted(parts)]
        digests = [parts[number][1] for number in sorted(parts)]

        def ask() -> str | None:
            what = {"Bucket": bucket, "Key": key, "UploadId": upload.id, "MultipartUpload": {"Parts": listed}}
            try:
                return str(self._call("complete_multipart_upload", **what).get("ETag"))
            except OSError as error:
                if code_of(error) == "NoSuchUpload" and self.size(upload.name) == size:
                    return None
                raise

        tag = (self._asked(upload.name, ask) or "").strip('"')
        if tag.endswith(f"-{len(digests)}") and None not in digests:
            whole = hashlib.md5(b"".join(each for each in digests if each), usedforsecurity=False).hexdigest()
            if tag != f"{whole}-{len(digests)}":
                raise self._damaged(upload.name, f"{whole}-{len(digests)}", tag)

    def _damaged(self, name: str, expected: str, found: str) -> OutputError:
        return OutputError(
            "came to the store otherwise than it was sent",
            file=self.named(name),
            expected=expected,
            found=f"ETag {found}",
            remedy="look at what lies between; then run the same command again: it resumes",
        )

    def _call(self, method: str, **asked: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._filesystem.call_s3(method, **asked)
        return answer

    def _key(self, name: str) -> tuple[str, str]:
        """Return the bucket, and the key of an object."""
        bucket, _, prefix = self._root.partition("/")
        return bucket, "/".join(part for part in (prefix, name) if part)


def _sum(data: bytes) -> dict[str, str]:
    return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}
