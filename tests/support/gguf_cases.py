"""GGUF files for tests: a sound one with every value type, and broken ones, each with the error it must give."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf_builder as b
from gguf import GGMLQuantizationType

F32, Q4_0, Q4_K = GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_K

# A sound file with every value type and three tensors: 64 + 96 (padded from 72) + 288 bytes.
KEYS = [
    b.key("general.architecture", b.STRING, "test"),
    b.key("a.u8", b.U8, 200),
    b.key("a.i8", b.I8, -100),
    b.key("a.u16", b.U16, 60000),
    b.key("a.i16", b.I16, -30000),
    b.key("a.u32", b.U32, 4_000_000_000),
    b.key("a.i32", b.I32, -2_000_000_000),
    b.key("a.u64", b.U64, 2**64 - 1),
    b.key("a.i64", b.I64, -(2**63)),
    b.key("a.f32", b.F32, 0.5),
    b.key("a.f64", b.F64, 0.1),
    b.key("a.true", b.BOOL, 1),
    b.key("a.false", b.BOOL, 0),
    b.array("a.strings", b.STRING, ["", "x", "käse", b"\xe4\xbd"]),
    b.array("a.floats", b.F32, [1.5, -2.5]),
    b.array("a.bools", b.BOOL, [1, 0, 1]),
    b.array("a.none", b.I32, []),
]
VALUES = {
    "general.architecture": "test",
    "a.u8": 200,
    "a.i8": -100,
    "a.u16": 60000,
    "a.i16": -30000,
    "a.u32": 4_000_000_000,
    "a.i32": -2_000_000_000,
    "a.u64": 2**64 - 1,
    "a.i64": -(2**63),
    "a.f32": 0.5,
    "a.f64": 0.1,
    "a.true": True,
    "a.false": False,
    "a.strings": ["", "x", "käse", "\udce4\udcbd"],
    "a.floats": [1.5, -2.5],
    "a.bools": [True, False, True],
    "a.none": [],
}
TENSORS = [b.tensor("t.f", [4, 2, 2], F32, 0), b.tensor("t.q", [64, 2], Q4_0, 64), b.tensor("t.k", [256, 2], Q4_K, 160)]
DATA = random.Random(0).randbytes(160 + 288)
PIECES = b.pieces(KEYS, TENSORS, DATA)
SOUND = b"".join(PIECES)


def write(folder: Path, files: bytes | dict[str, bytes]) -> Path:
    """The path of the first of files, after writing them all."""
    files = {"model.gguf": files} if isinstance(files, bytes) else files
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / next(iter(files))


def cut(piece: int, n_bytes: int) -> bytes:
    """The sound file up to n_bytes into its piece of that number; negative counts from the piece's end."""
    start, length = sum(map(len, PIECES[:piece])), len(PIECES[piece])
    return SOUND[: start + n_bytes % (length + 1)]


def one_tensor(*args: object, data: int = 4096, keys: list[bytes] | None = None, **kwargs: int) -> bytes:
    return b.build(keys or [], [b.tensor(*args, **kwargs)], bytes(data))


def two_tensors(second_offset: int, names: tuple[str, str] = ("t.a", "t.b")) -> bytes:
    return b.build([], [b.tensor(names[0], [8], F32, 0), b.tensor(names[1], [8], F32, second_offset)], bytes(4096))


def part(number: int, count: int, tensors: list[str], n_tensors: int = 2, extra: list[bytes] | None = None) -> bytes:
    keys = [
        b.key("split.no", b.U16, number),
        b.key("split.count", b.U16, count),
        b.key("split.tensors.count", b.I32, n_tensors),
    ]
    records = [b.tensor(name, [8], F32, 32 * i) for i, name in enumerate(tensors)]
    return b.build(keys if extra is None else extra, records, bytes(32 * len(tensors)))


def split(
    first: bytes, second: bytes | None, names: tuple[str, str] = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
):
    return {names[0]: first} | ({} if second is None else {names[1]: second})


HUGE = 2**62
SOUND_PART = part(0, 2, ["t.a"])
N_KEYS = len(KEYS)

# Name of the fault: the files (the first is the one to open), and a part of the error that must come of it.
BROKEN: dict[str, tuple[bytes | dict[str, bytes], str]] = {
    # the start
    "empty file": (b"", "is empty (0 bytes), expected a GGUF file"),
    "cut in the magic": (cut(0, 3), "the header is cut off: expected 4 bytes at offset 0, found 3"),
    "cut after the magic": (cut(0, 4), "the header is cut off: expected 4 bytes at offset 4, found 0"),
    "cut in the tensor count": (cut(2, 7), "the header is cut off: expected 8 bytes at offset 8, found 7"),
    "cut in the key count": (b.build()[:17], "the header is cut off: expected 8 bytes at offset 16, found 1"),
    "cut after the counts": (cut(3, -1), "the header declares 3 tensors, but the 8 bytes left can hold 0"),
    "other magic": (b.build(KEYS, magic=b"GGJT"), "has magic b'GGJT', expected b'GGUF': not a GGUF file"),
    "text file": (b"hello, world\n" * 9, "has magic b'hell', expected b'GGUF'"),
    "version 0": (b.build(KEYS, version=0), "has version 0, expected 2 or 3"),
    "version 1": (b.build(KEYS, version=1), "has version 1, expected 2 or 3"),
    "version 4": (b.build(KEYS, version=4), "has version 4, expected 2 or 3"),
    "byte-swapped version": (b.build(KEYS, version=0x03000000), "has version 0x03000000: a big-endian file"),
    "huge tensor count": (b.build(KEYS, n_tensors=HUGE), f"the header declares {HUGE} tensors, expected at most 65536"),
    "huge key count": (b.build(KEYS, n_keys=HUGE), f"the header declares {HUGE} keys, expected at most 65536"),
    "negative tensor count": (
        b.build(KEYS, n_tensors=2**64 - 1),
        "the header declares 18446744073709551615 tensors, expected at most 65536",
    ),
    "one key too many said": (
        b.build(KEYS, [], bytes(64), n_keys=N_KEYS + 1),
        f"key {N_KEYS + 1} of {N_KEYS + 1} has an empty name",
    ),
    "more keys than the limit": (
        b.build([], [], bytes(2**20), n_keys=65537),
        "the header declares 65537 keys, expected at most 65536",
    ),
    # keys
    "cut in a key's name length": (
        b.build(KEYS[:2])[: 24 + len(KEYS[0]) + 5],
        "key 2 of 2 is cut off: expected 8 bytes",
    ),
    "cut in a key's name": (
        b.build([b.key("k" * 40, b.U8, 1)])[: 24 + 8 + 10],
        "key 1 of 1 is cut off: expected 40 bytes at offset 32, found 10",
    ),
    "cut in a key's type": (b.build(KEYS[:1])[: 24 + 8 + 20 + 2], "key 'general.architecture' is cut off: expected 4"),
    "cut in a number": (
        b.build([b.raw_key("k", b.F64, bytes(7))], alignment=1),
        "key 'k' is cut off: expected 8 bytes",
    ),
    "cut in a string": (
        b.build([b.raw_key("k", b.STRING, b.text("abc", 9))], alignment=1),
        "key 'k' is cut off: expected 9 bytes at offset 45, found 3",
    ),
    "huge string": (
        b.build([b.raw_key("k", b.STRING, b.text("abc", HUGE))]),
        f"key 'k' has a string of {HUGE} bytes, expected at most 1073741824",
    ),
    "huge key name": (b.build([b.text("key", HUGE) + bytes(64)]), f"key 1 of 1 has a name of {HUGE} bytes"),
    "key name over the format's limit": (
        b.build([b.key("k" * 65536, b.U8, 1)]),
        "a name of 65536 bytes, expected at most",
    ),
    "empty key name": (b.build([b.key("", b.U8, 1)]), "key 1 of 1 has an empty name"),
    "key twice": (b.build([b.key("k", b.U8, 1), b.key("k", b.U8, 2)]), "key 'k' appears twice"),
    "key not UTF-8": (b.build([b.key(b"k\xff", b.U8, 1)]), "key 1 of 1 has a name that is not UTF-8 (byte 1)"),
    "string not UTF-8": (b.build([b.key("k", b.STRING, b"ab\xc3")]), "key 'k' has a string that is not UTF-8 (byte 2)"),
    "unknown value type": (b.build([b.raw_key("k", 13, bytes(8))]), "key 'k' has value type 13, expected 0 to 12"),
    "bool byte 2": (b.build([b.raw_key("k", b.BOOL, b"\x02")]), "key 'k' has the bool byte 2, expected 0 or 1"),
    "bool byte 255 in an array": (b.build([b.array("k", b.BOOL, [0, 1, 255])]), "key 'k' has the bool byte 255"),
    # arrays
    "array of arrays": (
        b.build([b.raw_key("k", b.ARRAY, struct.pack("<IQ", b.ARRAY, 0))]),
        "key 'k' is an array of arrays",
    ),
    "unknown item type": (
        b.build([b.raw_key("k", b.ARRAY, struct.pack("<IQ", 99, 0))]),
        "'k' has item type 99, expected",
    ),
    "huge item count": (
        b.build([b.array("k", b.U32, [1, 2], HUGE)]),
        f"key 'k' declares {HUGE} items, expected at most 1073741824",
    ),
    "huge string count": (
        b.build([b.array("k", b.STRING, ["a"], HUGE)]),
        f"key 'k' declares {HUGE} strings, expected at most 1073741824",
    ),
    "item count past the end": (b.build([b.array("k", b.F64, [1.0], 3)]), "key 'k' declares 3 items, but the "),
    "item bytes wrap to zero": (
        b.build([b.array("k", b.F64, [1.0], 2**61)]),
        f"key 'k' declares {2**61} items, expected at most",
    ),
    "string item past the end": (
        b.build([b.raw_key("k", b.ARRAY, struct.pack("<IQ", b.STRING, 2) + b.text("a") + b.text("b", 99))]),
        "key 'k' has 99 bytes in item 1 of 2, expected at most ",
    ),
    "huge string item": (
        b.build([b.raw_key("k", b.ARRAY, struct.pack("<IQ", b.STRING, 2) + b.text("a", HUGE) + bytes(32))]),
        f"key 'k' has {HUGE} bytes in item 0 of 2, expected at most ",
    ),
    "string item without length": (
        b.build([b.raw_key("k", b.ARRAY, struct.pack("<IQ", b.STRING, 2) + b.text("abcdefgh"))], alignment=1),
        "key 'k' is cut off at item 1 of 2: found no length at offset 65",
    ),
    # alignment
    "alignment 0": (
        b.build([b.key("general.alignment", b.U32, 0)]),
        "'general.alignment' is 0, expected a power of two",
    ),
    "alignment 48": (
        b.build([b.key("general.alignment", b.U32, 48)]),
        "'general.alignment' is 48, expected a power of two",
    ),
    "alignment u64": (b.build([b.key("general.alignment", b.U64, 32)]), "has type uint64, expected uint32"),
    "alignment array": (
        b.build([b.array("general.alignment", b.U32, [32])]),
        "has type array of uint32, expected uint32",
    ),
    "largest alignment": (
        one_tensor("t", [8], F32, 0, keys=[b.key("general.alignment", b.U32, 2**31)]),
        "tensor 't' is not within the file: its 32 bytes end at offset 2147483680",
    ),
    # tensor records
    "cut in a tensor's name": (
        b.build([], [b.tensor("t" * 60, [8], F32, 0)])[: 24 + 8 + 20],
        "tensor 1 of 1 is cut off: expected 60 bytes at offset 32, found 20",
    ),
    "cut in the dimensions": (cut(4 + N_KEYS + 2, 8 + 3 + 4 + 8), "tensor 't.k' is cut off: expected 8 bytes at"),
    "cut in the tensor type": (cut(4 + N_KEYS + 2, 8 + 3 + 4 + 16 + 3), "tensor 't.k' is cut off: expected 4 bytes"),
    "cut in the offset": (cut(4 + N_KEYS + 2, -2), "tensor 't.k' is cut off: expected 8 bytes"),
    "huge tensor name": (b.build([], [b.text("t", HUGE) + bytes(64)]), f"tensor 1 of 1 has a name of {HUGE} bytes"),
    "tensor name of 64 bytes": (
        one_tensor("t" * 64, [8], F32, 0),
        "tensor 1 of 1 has a name of 64 bytes, expected at most 63",
    ),
    "tensor name not UTF-8": (one_tensor(b"\xff", [8], F32, 0), "tensor 1 of 1 has a name that is not UTF-8"),
    "tensor twice": (two_tensors(32, ("t", "t")), "tensor 't' appears twice"),
    "5 dimensions": (one_tensor("t", [2, 1, 1, 1, 1], F32, 0), "tensor 't' has 5 dimensions, expected at most 4"),
    "huge dimension count": (
        one_tensor("t", [8], F32, 0, n_dims=2**32 - 1),
        "has 4294967295 dimensions, expected at most",
    ),
    "zero dimension": (one_tensor("t", [8, 0], F32, 0), "tensor 't' has shape (0, 8), expected sizes from 1"),
    "negative dimension": (
        one_tensor("t", [2**64 - 8], F32, 0),
        "has shape (18446744073709551608,), expected sizes from",
    ),
    "elements wrap to zero": (
        one_tensor("t", [2**32, 2**32], F32, 0),
        "18446744073709551616 elements; expected fewer than",
    ),
    "elements wrap to one": (one_tensor("t", [2**62, 2**62, 16], F32, 0), "elements; expected fewer than 2^63"),
    "bytes wrap": (one_tensor("t", [2**62], F32, 0), f"tensor 't' takes {2**64} bytes, expected fewer than 2^63"),
    "removed type": (one_tensor("t", [32], 4, 0), "tensor 't' has type 4, which is not a known ggml type"),
    "another removed type": (one_tensor("t", [32], 36, 0), "tensor 't' has type 36, which is not a known"),
    "unknown type": (one_tensor("t", [32], 2**31, 0), "tensor 't' has type 2147483648, which is not a known"),
    "row not whole blocks": (
        one_tensor("t", [33, 32], Q4_0, 0),
        "has rows of 33 elements, expected a multiple of 32 for Q4_0",
    ),
    "row not whole K blocks": (
        one_tensor("t", [1408, 4], Q4_K, 0),
        "rows of 1408 elements, expected a multiple of 256",
    ),
    # tensor data
    "first tensor not at 0": (one_tensor("t", [8], F32, 32), "tensor 't' has offset 32, expected 0, the end of the"),
    "overlapping tensors": (two_tensors(0), "tensor 't.b' has offset 0, expected 32, the end of the tensors before it"),
    "gap between tensors": (two_tensors(64), "tensor 't.b' has offset 64, expected 32"),
    "unaligned offset": (two_tensors(33), "tensor 't.b' has offset 33, expected 32"),
    "offset out of the file": (two_tensors(2**40), f"tensor 't.b' has offset {2**40}, expected 32"),
    "offset sum wraps": (two_tensors(2**64 - 32), f"tensor 't.b' has offset {2**64 - 32}, expected 32"),
    "tensor out of the file": (
        one_tensor("t", [2048], F32, 0),
        "tensor 't' is not within the file: its 8192 bytes end at",
    ),
    "tensor of 2^62 bytes": (one_tensor("t", [2**60], F32, 0), f"not within the file: its {2**62} bytes"),
    "cut in the padding": (cut(4 + N_KEYS + 3, 1), "tensor 't.f' is not within the file"),
    "data cut by one byte": (SOUND[:-1], "tensor 't.k' is not within the file: its 288 bytes end at"),
    "all data missing": (SOUND[: -len(DATA)], "tensor 't.f' is not within the file"),
    # split files
    "part missing": (
        split(SOUND_PART, None),
        "m-00002-of-00002.gguf: no such file; m-00001-of-00002.gguf is the first of 2",
    ),
    "part that is not the first": (
        split(part(1, 2, ["t.a"]), SOUND_PART, ("m-00002-of-00002.gguf", "m-00001-of-00002.gguf")),
        "is part 2 of 2 of a split model; open the first, ",
    ),
    "part renamed": (
        split(SOUND_PART, None, ("m.gguf", "")),
        "part 1 of 2 by its keys, expected a name ending in -00001-of-",
    ),
    "part named as another": (
        split(part(1, 2, ["t.a"]), part(0, 2, ["t.b"])),
        "is part 2 of 2 by its keys, expected a name ending in -00002-of-00002.gguf",
    ),
    "part with another number": (
        split(SOUND_PART, part(0, 2, ["t.b"])),
        "key 'split.no' is 0, expected 1 from the parts",
    ),
    "part with another count": (
        split(SOUND_PART, part(1, 3, ["t.b"])),
        "key 'split.count' is 3, expected 2 from the parts",
    ),
    "part without number": (
        split(SOUND_PART, part(1, 2, ["t.b"], extra=[])),
        "m-00002-of-00002.gguf: key 'split.no' (uint16) is missing",
    ),
    "first part without number": (
        split(part(0, 2, ["t.a"], extra=[b.key("split.count", b.U16, 2)]), None),
        "key 'split.no' (uint16) is missing",
    ),
    "split count of another type": (
        split(part(0, 2, ["t.a"], extra=[b.key("split.count", b.U32, 2)]), None),
        "key 'split.count' has type uint32, expected uint16",
    ),
    "fewer tensors than said": (
        split(part(0, 2, ["t.a"], 3), part(1, 2, ["t.b"], 3)),
        "key 'split.tensors.count' is 3, expected 2 from the parts",
    ),
    "tensor in two parts": (split(SOUND_PART, part(1, 2, ["t.a"])), "tensor 't.a' is also in m-00001-of-00002.gguf"),
    "broken second part": (
        split(SOUND_PART, b"GGML" + bytes(64)),
        "m-00002-of-00002.gguf: the header has magic b'GGML'",
    ),
    "empty second part": (split(SOUND_PART, b""), "m-00002-of-00002.gguf: is empty"),
}
