"""The reader agrees with the `gguf` package, and refuses every broken file with its own error."""

import struct

import gguf
import numpy as np
import pytest
from models.gguf_reader import TENSOR_TYPES, GGUFError, dequantise, read_gguf

from .tiny_gguf import TYPES, f32, gguf_bytes, string, value

EVERY_KIND = {
    "u8": ("u8", 200),
    "i8": ("i8", -3),
    "u16": ("u16", 60000),
    "i16": ("i16", -300),
    "u32": ("u32", 4_000_000_000),
    "i32": ("i32", -5),
    "f32": ("f32", 0.5),
    "bool": ("bool", True),
    "string": ("string", "grüße"),
    "numbers": ("array:i32", [1, -2, 3]),
    "words": ("array:string", ["a", "", "ż"]),
    "nested": ("array:array:u8", [[1, 2], [], [3]]),
    "u64": ("u64", 2**63),
    "i64": ("i64", -(2**62)),
    "f64": ("f64", 0.1),
}


def read(tmp_path, data: bytes):
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    return read_gguf(path)


def tiny() -> bytes:
    quantised = (8, (2, 32), bytes(range(68)))
    return gguf_bytes(EVERY_KIND, {"a": f32(np.arange(6).reshape(2, 3)), "q": quantised})


@pytest.mark.parametrize("version", [2, 3])
def test_every_metadata_type_comes_back(tmp_path, version):
    file = read(tmp_path, gguf_bytes(EVERY_KIND, {}, version=version))
    assert list(file.metadata) == list(EVERY_KIND)
    for key, (kind, content) in EVERY_KIND.items():
        found = file.metadata[key]
        if key == "nested":
            assert [item.tolist() for item in found] == content
        else:
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == content, kind


def test_tensors_come_outermost_axis_first_wherever_they_are_aligned(tmp_path):
    tensors = {"a": f32(np.arange(6).reshape(2, 3)), "b": f32(np.arange(24).reshape(2, 3, 4))}
    for align in (32, 64, 8):
        metadata = {"general.alignment": ("u32", align)}
        file = read(tmp_path, gguf_bytes(metadata, tensors, align=align))
        np.testing.assert_array_equal(file.tensor("a"), np.arange(6).reshape(2, 3))
        np.testing.assert_array_equal(file.tensor("b"), np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize("number", TENSOR_TYPES)
def test_a_format_is_bit_equal_to_the_oracle_whatever_the_bytes(number):
    kind, oracle = TENSOR_TYPES[number], gguf.GGMLQuantizationType(number)
    assert (oracle.name, gguf.GGML_QUANT_SIZES[oracle]) == (
        kind.name,
        (kind.block_size, kind.block_bytes),
    )
    raw = np.random.default_rng(number).integers(0, 256, (3000, kind.block_bytes), np.uint8)
    with np.errstate(all="ignore"):  # random scales hold NaN and Inf, too
        expected = gguf.quants.dequantize(raw, oracle).astype(np.float32)
    np.testing.assert_array_equal(
        dequantise(kind, raw.reshape(-1)).view(np.uint32), expected.reshape(-1).view(np.uint32)
    )


def test_a_whole_file_reads_as_the_oracle_reads_it(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {
        f"t{number}": (
            number,
            (3, 2 * kind.block_size),
            rng.integers(0, 60, 6 * kind.block_bytes, np.uint8).tobytes(),
        )
        for number, kind in TENSOR_TYPES.items()
    }
    file = read(tmp_path, gguf_bytes({"general.architecture": ("string", "llama")}, tensors))
    same_as_oracle(file)


@pytest.mark.long
def test_the_real_file_reads_as_the_oracle_reads_it(real_gguf):
    same_as_oracle(read_gguf(real_gguf))


def same_as_oracle(file):
    oracle = gguf.GGUFReader(file.path)
    assert [t.name for t in oracle.tensors] == list(file.tensors)
    for tensor in oracle.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = file.tensor(tensor.name, tuple(int(n) for n in tensor.shape[::-1]))
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


# ---- broken files


def open_and_read_all(tmp_path, data: bytes) -> None:
    file = read(tmp_path, data)
    for name in file.tensors:
        file.tensor(name)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = tiny()
    open_and_read_all(tmp_path, data)
    for end in range(len(data)):
        with pytest.raises(GGUFError, match="expected"):
            open_and_read_all(tmp_path, data[:end])


def test_no_flipped_bit_brings_another_error_than_the_readers_own(tmp_path):
    data = tiny()
    refused = 0
    for bit in range(0, 8 * len(data), 3):  # every byte, and every place in a byte
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        try:
            open_and_read_all(tmp_path, bytes(broken))
        except (GGUFError, NotImplementedError) as error:
            refused += 1
            assert "expected" in str(error) or "this reader knows" in str(error)
    assert refused > 300


def header(*parts: bytes, tensors: int = 0, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def item(key: str, kind: str, content: bytes) -> bytes:
    return string(key) + struct.pack("<I", TYPES[kind]) + content


ROOM = bytes(256)
BROKEN = {
    "empty": (b"", "4 bytes for the magic"),
    "another kind of file": (b"PK\x03\x04" + ROOM, "begins with b'GGUF'"),
    "the config.json of a checkpoint": (b'{"architectures": []}', "give the folder"),
    "version 1": (header(version=1), "version 2 or 3"),
    "big-endian": (header(version=3 << 24), "version 2 or 3"),
    "2**64 - 1 tensors": (header(ROOM, tensors=2**64 - 1), "tensors"),
    "2**60 entries": (header(ROOM, entries=2**60), "metadata entries"),
    "a string of 2**63 bytes": (header(struct.pack("<Q", 2**63), ROOM, entries=1), "key"),
    "no UTF-8": (header(struct.pack("<Q", 2), b"\xc1\xff", ROOM, entries=1), "UTF-8"),
    "value type 13": (header(string("k"), struct.pack("<I", 13), ROOM, entries=1), "0 to 12"),
    "an array of 2**62 numbers": (
        header(item("k", "array", struct.pack("<IQ", TYPES["u64"], 2**62)), ROOM, entries=1),
        "at most",
    ),
    "arrays nested 900 deep": (
        header(item("k", "array", struct.pack("<IQ", 9, 1) * 900), ROOM, entries=1),
        "nested",
    ),
    "a key twice": (
        header(item("k", "u8", b"1") * 2, entries=2),
        "once",
    ),
    "an alignment of 24": (
        header(item("general.alignment", "u32", value("u32", 24)), entries=1),
        "power of two",
    ),
    "an alignment that is text": (
        header(item("general.alignment", "string", string("32")), entries=1),
        "power of two",
    ),
    "five axes": (header(entry("t", (1,) * 5), ROOM, tensors=1), "1 to 4 axes"),
    "no axis": (header(entry("t", ()), ROOM, tensors=1), "1 to 4 axes"),
    "an axis of 0": (header(entry("t", (4, 0)), ROOM, tensors=1), "at least 1"),
    "a row that ends inside a block": (header(entry("t", (33,), 8), ROOM, tensors=1), "multiple"),
    "sizes whose product passes 2**64": (
        header(entry("t", (2**40, 2**40)), ROOM, tensors=1),
        "before the end",
    ),
    "data behind the end": (header(entry("t", (8,), 0, 2**63), ROOM, tensors=1), "before the end"),
    "data that is not aligned": (header(entry("t", (8,), 0, 4), ROOM, tensors=1), "multiple of 32"),
    "tensors over one another": (
        header(entry("a", (16,)), entry("b", (8,), 0, 32), ROOM, tensors=2),
        "after 'a'",
    ),
    "a tensor twice": (
        header(entry("a", (8,)), entry("a", (8,), 0, 32), ROOM, tensors=2),
        "once",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_lies_is_refused_before_anything_is_allocated(tmp_path, case):
    data, message = BROKEN[case]
    with pytest.raises(GGUFError, match=message):
        read(tmp_path, data)


def test_a_format_that_is_not_known_is_named(tmp_path):
    with pytest.raises(NotImplementedError, match="'t' is stored as ggml type 19.*Q4_K"):
        read(tmp_path, header(entry("t", (256,), 19), ROOM, tensors=1))


def test_a_file_cut_after_it_was_opened_gives_an_error_and_no_crash(tmp_path):
    file = read(tmp_path, tiny())
    file.path.write_bytes(tiny()[:-1])
    with pytest.raises(GGUFError, match="changed after it was opened"):
        file.tensor("q")


def test_what_is_not_in_the_file_is_named(tmp_path):
    file = read(tmp_path, tiny())
    with pytest.raises(GGUFError, match="'missing'"):
        file.tensor("missing")
    with pytest.raises(GGUFError, match=r"shape \(3, 2\), got \(2, 3\)"):
        file.tensor("a", (3, 2))
    with pytest.raises(GGUFError, match="'missing'"):
        file.value("missing", int)
    with pytest.raises(GGUFError, match="'string'"):
        file.value("string", int)
    with pytest.raises(GGUFError, match="'bool'"):
        file.value("bool", int)
