"""The part of the stand-in Hub that is Xet storage, as `hf_xet` speaks to it: https://huggingface.co/docs/xet.

A client cuts files into chunks and sends them compressed, many in one *xorb*; then a *shard* that says for each file
which chunks of which xorbs it is made of. Here a file is put together as soon as its shard comes. For reading, the
client asks which ranges of which xorbs to fetch, fetches them, and puts the file together itself.

What belongs to large stores alone is left out: telling clients of chunks that others have sent, and large uploads past
the server. Clients ask for both, are told that there is no such thing, and do without.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

HEADER, ENTRY = 48, 48  # bytes of a shard's header and of each of its entries
HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30  # flags of a file in a shard


@dataclass(frozen=True)
class Term:
    """The chunks `start` to `stop` of a xorb, `length` bytes when unpacked."""

    xorb: str
    start: int
    stop: int
    length: int


@dataclass
class XetStorage:
    xorbs: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, list[Term]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # Xet's hash of a file by its SHA-256

    def add_shard(self, shard: bytes) -> dict[str, bytes]:
        """Put its files together: their contents by SHA-256."""
        found = {}
        for name, terms in files_of(shard).items():
            content = b"".join(chunk for term in terms for chunk in self._chunks(term))
            digest = hashlib.sha256(content).hexdigest()
            self.files[name], self.hashes[digest], found[digest] = terms, name, content
        return found

    def _chunks(self, term: Term) -> list[bytes]:
        xorb = self.xorbs[term.xorb]
        chunks = [
            unpacked(xorb[start:stop]) for start, stop in pairwise(chunk_offsets(xorb)[term.start : term.stop + 1])
        ]
        assert sum(map(len, chunks)) == term.length
        return chunks

    def reconstruction(self, name: str, address: str) -> dict[str, Any]:
        """How to read a file: its terms, and where under `address` the bytes of their chunks are."""
        fetch: dict[str, list[Mapping[str, Any]]] = {}
        terms = []
        for term in self.files[name]:
            chunks = {"start": term.start, "end": term.stop}
            offsets = chunk_offsets(self.xorbs[term.xorb])
            place = {"start": offsets[term.start], "end": offsets[term.stop] - 1}
            fetch.setdefault(term.xorb, []).append(
                {"range": chunks, "url": f"{address}/{term.xorb}", "url_range": place}
            )
            terms.append({"hash": term.xorb, "unpacked_length": term.length, "range": chunks})
        return {"offset_into_first_range": 0, "terms": terms, "fetch_info": fetch}


def number(content: bytes) -> int:
    return int.from_bytes(content, "little")


def hash_name(content: bytes) -> str:
    """A hash of 32 bytes is written as four little-endian numbers of 64 bits."""
    return "".join(f"{number(content[start : start + 8]):016x}" for start in range(0, 32, 8))


def files_of(shard: bytes) -> dict[str, list[Term]]:
    """The files in a shard: each an entry with its hash, entries for its terms and others that are passed over."""
    files: dict[str, list[Term]] = {}
    place = HEADER

    def entry() -> tuple[bytes, list[int]]:
        nonlocal place
        place += ENTRY
        start = place - ENTRY
        return shard[start : start + 32], [number(shard[start + n : start + n + 4]) for n in (32, 36, 40, 44)]

    while True:
        name, (flags, count, _, _) = entry()
        if name == b"\xff" * 32:  # the end of the files
            return files
        terms = []
        for _ in range(count):
            xorb, (_, length, start, stop) = entry()
            terms.append(Term(hash_name(xorb), start, stop, length))
        files[hash_name(name)] = terms
        place += ENTRY * (count * bool(flags & HAS_VERIFICATION) + bool(flags & HAS_METADATA))


def chunk_offsets(xorb: bytes) -> list[int]:
    """Where the chunks of a xorb begin, and where the last one ends. Behind them there may be an index."""
    offsets = [0]
    while offsets[-1] < len(xorb) and xorb[offsets[-1]] == 0:  # the version of a chunk's header
        offsets.append(offsets[-1] + 8 + number(xorb[offsets[-1] + 1 : offsets[-1] + 4]))
    return offsets


def unpacked(chunk: bytes) -> bytes:
    """A chunk's content: as it is, LZ4, or LZ4 of every fourth byte, then of every fourth byte but one, and so on."""
    scheme, length, packed = chunk[4], number(chunk[5:8]), chunk[8:]
    content = packed if scheme == 0 else lz4_frame(packed)
    if scheme == 2:
        grouped, content = content, bytearray(length)
        start = 0
        for index in range(4):
            size = len(range(index, length, 4))
            content[index::4] = grouped[start : start + size]
            start += size
    assert len(content) == length
    return bytes(content)


def lz4_frame(frame: bytes) -> bytearray:
    """https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md, checksums unread."""
    assert frame[:4] == b"\x04\x22\x4d\x18"
    flags = frame[4]
    place = (
        7 + 8 * bool(flags & 8) + 4 * bool(flags & 1)
    )  # behind the sizes of the content and the name of a dictionary
    content = bytearray()
    while size := number(frame[place : place + 4]):
        place += 4
        block = frame[place : place + (size & 0x7FFFFFFF)]
        place += len(block) + 4 * bool(flags & 16)
        if size >> 31:
            content += block
        else:
            lz4_block(block, content)
    return content


def lz4_block(block: bytes, content: bytearray) -> None:
    """Sequences of literals and of a match in what is there already, which may run into what it adds."""
    place = 0

    def length(nibble: int) -> int:
        nonlocal place
        total = nibble
        while nibble == 15:
            total += block[place]
            place += 1
            if block[place - 1] != 255:
                break
        return total

    while place < len(block):
        token = block[place]
        place += 1
        literals = length(token >> 4)
        content += block[place : place + literals]
        place += literals
        if place == len(block):
            return
        offset = number(block[place : place + 2])
        place += 2
        start = len(content) - offset
        for index in range(start, start + length(token & 15) + 4):
            content.append(content[index])
