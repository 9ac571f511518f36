"""A reader of BLAST nucleotide databases, format version 4 (the files .nin, .nhr and .nsq).

The index holds three tables of offsets: where each record's header, packed sequence and ambiguities begin. A sequence
is packed four bases to a byte; bases that are ambiguous were packed as some base and are listed behind the sequence.
"""

import struct
from pathlib import Path

import numpy as np

IUPAC = "-ACMGRSVTWYHKDBN"  # ncbi4na: bit 0 = A, bit 1 = C, bit 2 = G, bit 3 = T
_BASES = np.frombuffer(b"ACGT", np.uint8)
_UNPACKED = _BASES[np.arange(256)[:, None] >> np.array([6, 4, 2, 0]) & 3]  # [256, 4], high bits first


class BlastDatabase:
    """The records of `path`.nin, .nhr and .nsq.

    Raises:
        ValueError: if the database is not version 4, holds proteins, or its index has the wrong length.
    """

    def __init__(self, path: Path) -> None:
        index, self._headers, self._packed = (Path(f"{path}{end}").read_bytes() for end in (".nin", ".nhr", ".nsq"))
        version, kind = struct.unpack_from(">2i", index)
        if (version, kind) != (4, 0):
            raise ValueError(f"{path}.nin must be version 4, type 0 (nucleotides), got version {version}, type {kind}")
        at = 8
        for _ in ("title", "date"):
            at += 4 + struct.unpack_from(">i", index, at)[0]
        (n,) = struct.unpack_from(">i", index, at)
        at += 16  # the count, the total length (int64) and the longest length
        if len(index) != at + 12 * (n + 1):
            raise ValueError(f"{path}.nin must have {at + 12 * (n + 1)} bytes for {n} records, got {len(index)}")
        offsets = np.frombuffer(index, ">u4", 3 * (n + 1), at).reshape(3, n + 1)
        self._header_at, self._sequence_at, self._ambiguity_at = offsets.tolist()

    def __len__(self) -> int:
        return len(self._header_at) - 1

    def title(self, i: int) -> str:
        """The title of record i: the first VisibleString (tag 0x1a) of its ASN.1 header."""
        at = self._headers.index(b"\x1a", self._header_at[i]) + 1
        size = self._headers[at]
        at += 1
        if size & 0x80:  # long form: the low bits count the bytes of the length
            end = at + (size & 0x7F)
            at, size = end, int.from_bytes(self._headers[at:end], "big")
        return self._headers[at : at + size].decode("latin-1")

    def sequence(self, i: int) -> str:
        """The sequence of record i in IUPAC letters, ambiguities included."""
        packed = np.frombuffer(self._packed[self._sequence_at[i] : self._ambiguity_at[i]], np.uint8)
        bases = _UNPACKED[packed].ravel()[: 4 * (len(packed) - 1) + int(packed[-1] & 3)]
        listed = self._packed[self._ambiguity_at[i] : self._sequence_at[i + 1]]
        for letter, first, size in _ambiguities(listed):
            bases[first : first + size] = ord(letter)
        return bases.tobytes().decode("ascii")


def _ambiguities(listed: bytes) -> list[tuple[str, int, int]]:
    """(letter, first base, number of bases) of each stretch.

    A count of 32-bit words comes first. Its top bit chooses how a stretch is stored. Unset: in one word of 4 bits
    letter, 4 bits length - 1, 24 bits position. Set: in two words of 4 bits letter, 12 bits length - 1, 16 bits unused
    and 32 bits position.
    """
    if not listed:
        return []
    words = [w for (w,) in struct.iter_unpack(">I", listed)]
    if words[0] >> 31:
        return [(IUPAC[a >> 28], b, (a >> 16 & 0xFFF) + 1) for a, b in zip(words[1::2], words[2::2], strict=True)]
    return [(IUPAC[a >> 28], a & 0xFFFFFF, (a >> 24 & 0xF) + 1) for a in words[1:]]
