"""Arrays of a loop's own in a snapshot: what goes in comes back, and what is none is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from paged_decode import (
    SamplingParams,
    SnapshotCorrupt,
    compact_snapshot,
    export_sequence,
    import_sequence,
    inspect_snapshot,
    load_snapshot,
    save_snapshot,
    save_snapshot_async,
    verify_snapshot,
)
from paged_decode.cli import main
from paged_decode.snapshot._format import EXTRA_DTYPES

from ..tiny import make_engine
from . import independent_reader
from .forge import build
from .small import busy, make_allocator, make_cache, random_bits, using
from .test_deltas import SlowFiles

SHAPES = [(), (0,), (3,), (2, 0, 5), (1, 2, 3, 1), (1,) * 9, (2**31, 0)]


def same(found, expected) -> None:
    """The same names in order, dtypes, shapes and bits, in arrays that one may change."""
    assert list(found) == list(expected)
    for name, array in found.items():
        wanted = np.asarray(expected[name])
        assert type(array) is np.ndarray and array.flags.writeable
        assert (array.dtype.name, array.shape) == (wanted.dtype.name, wanted.shape), name
        assert array.tobytes() == wanted.astype(wanted.dtype.newbyteorder("<")).tobytes(), name


def empty():
    """Pools for what `small` saves."""
    return {"k": np.zeros((9, 1, 4, 1), np.int8)}, make_allocator(9)


@pytest.fixture(scope="module")
def small():
    allocator = make_allocator(4)
    allocator.allocate([1, 2, 3])
    return {"k": np.ones((4, 1, 4, 1), np.int8)}, allocator


@pytest.fixture(scope="module")
def sample(small, tmp_path_factory):
    """Header fields and arrays of a sound file with arrays of the user's."""
    path = tmp_path_factory.mktemp("sound") / "s"
    extra = {"a": np.arange(3), "flags": np.array([True, False])}
    save_snapshot(path, *small, extra=extra)
    fields, arrays, _ = independent_reader.read(path)
    return fields, arrays


def test_arrays_of_every_dtype_and_shape_come_back_bit_for_bit(tmp_path, small):
    extra = {}
    for dtype, kind in EXTRA_DTYPES.items():
        for shape in SHAPES:
            bits = random_bits(shape, np.uint8 if dtype == "bool" else kind, len(extra))
            extra[f"{dtype} {shape}"] = np.asarray(bits > 99) if dtype == "bool" else bits
    save_snapshot(tmp_path / "s", *small, extra=extra)
    same(load_snapshot(tmp_path / "s", *empty()).extra, extra)
    info = verify_snapshot(tmp_path / "s")
    found = {n: (s.dtype, s.shape) for n, s in info.extra.items()}
    assert found == {n: (a.dtype.name, a.shape) for n, a in extra.items()}
    _, arrays, ident = independent_reader.read(tmp_path / "s")
    assert ident == info.id
    found = {n.removeprefix("extra/"): np.array(a) for n, a in arrays.items() if "extra/" in n}
    same(found, extra)


def test_an_array_of_several_chunks_comes_back_and_every_chunk_is_checked(tmp_path, small):
    extra = {"big": np.arange(3 << 20).reshape(3, -1), "row": np.arange(2 << 20)[None]}
    path = tmp_path / "s"
    save_snapshot(path, *small, extra=extra)
    independent_reader.read(path)
    same(load_snapshot(path, *empty()).extra, extra)
    data, whole = bytearray(path.read_bytes()), path.read_bytes()
    for place in (whole.index(extra["big"][2].tobytes()) + 77, whole.index(b"\xff\xff\x1f\0\0")):
        data[place] ^= 1
        path.write_bytes(data)
        cache, allocator = empty()
        for call in (verify_snapshot, lambda p, c=cache, a=allocator: load_snapshot(p, c, a)):
            with pytest.raises(SnapshotCorrupt, match="extra/.*is not what was written"):
                call(path)
        assert allocator.num_free == 8
        data[place] ^= 1


def test_a_file_without_them_is_byte_for_byte_the_file_of_before(tmp_path, small):
    for name, extra in (("none", {}), ("empty", dict(extra={})), ("null", dict(extra=None))):
        save_snapshot(tmp_path / name, *small, **extra)
    whole = (tmp_path / "none").read_bytes()
    assert whole[8] == 1 and inspect_snapshot(tmp_path / "none").extra == {}
    assert (tmp_path / "empty").read_bytes() == (tmp_path / "null").read_bytes() == whole
    save_snapshot(tmp_path / "some", *small, extra={"x": np.zeros(1)})
    assert (tmp_path / "some").read_bytes()[8] == 3


def test_arrays_on_devices_are_put_together_and_other_orders_and_ends_are_put_right(
    tmp_path, small
):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    numbers = np.arange(24, dtype=np.float32).reshape(8, 3)
    extra = {
        "sharded": jax.device_put(numbers, sharding),
        "key": jax.random.key_data(jax.random.key(7)),
        "bf16": jnp.arange(5, dtype=jnp.bfloat16),
        "scalar": np.float32(3),
        "big-endian": numbers.astype(">f4"),
        "columns": np.asfortranarray(numbers)[::2],
    }
    save_snapshot(tmp_path / "s", *small, extra=extra)
    found = load_snapshot(tmp_path / "s", *empty()).extra
    same(found, extra)
    np.testing.assert_array_equal(found["big-endian"], numbers)
    assert found["big-endian"].dtype == np.float32


def test_a_save_behind_the_loop_has_the_arrays_of_the_moment_of_the_call(tmp_path, small):
    mine, theirs = np.arange(4), jnp.arange(4)
    with using(SlowFiles()) as slow:
        pending = save_snapshot_async(tmp_path / "s", *small, extra={"a": mine, "b": theirs})
    mine[:] = 9
    jax.jit(lambda x: x * 0, donate_argnums=0)(theirs)
    slow.go.set()
    pending.result(60)
    _, arrays, _ = independent_reader.read(tmp_path / "s")
    assert arrays["extra/a"].tolist() == arrays["extra/b"].tolist() == [0, 1, 2, 3]


def test_a_delta_has_its_own_arrays_and_folding_keeps_those_of_the_newest(tmp_path):
    cache, allocator, handles = busy()
    parent = save_snapshot(tmp_path / "0", cache, allocator, extra={"turn": np.array(0)})
    allocator.free(handles[0])
    middle = save_snapshot(tmp_path / "1", cache, allocator, parent=parent)
    newest = {"turn": np.array(2), "done": np.zeros(3, bool)}
    save_snapshot(tmp_path / "2", cache, allocator, parent=middle, extra=newest)
    for name, extra in (("0", {"turn": np.array(0)}), ("1", {}), ("2", newest)):
        verify_snapshot(tmp_path / name)
        same(load_snapshot(tmp_path / name, make_cache(60), make_allocator(60)).extra, extra)
        info = compact_snapshot(tmp_path / name, tmp_path / "folded")
        assert info.parent is None and list(info.extra) == list(extra)
        same(load_snapshot(tmp_path / "folded", make_cache(60), make_allocator(60)).extra, extra)
        assert (tmp_path / "folded").read_bytes()[8] == (3 if extra else 1)


def test_one_sequence_and_the_requests_of_an_engine_take_arrays_along(tmp_path):
    cache, allocator, (a, *_) = busy()
    extra = {"newest": np.array([5], np.int32)}
    export_sequence(tmp_path / "one", cache, allocator, a, extra=extra)
    same(import_sequence(tmp_path / "one", make_cache(24), make_allocator(24)).extra, extra)
    engine = make_engine()
    request = engine.submit([5, 6, 7], SamplingParams(max_new_tokens=6))  # no step: no program
    engine.save(tmp_path / "e", metadata={"turn": 3}, extra=extra)
    again = make_engine()
    ids = again.restore(tmp_path / "e")
    assert ids == {request: request} and ids.metadata == {"turn": 3}
    same(ids.extra, extra)
    again.save_async(tmp_path / "d", parent=ids.snapshot, extra={"x": np.zeros(2)}).result(60)
    assert inspect_snapshot(tmp_path / "d").parent
    assert list(inspect_snapshot(tmp_path / "d").extra) == ["x"]


def test_inspect_lists_them(tmp_path, small, capsys):
    extra = {
        "newest tokens": np.zeros((2, 3), np.int32),
        "step": np.array(7),
        "\x1b[2J": np.ones(1),
    }
    save_snapshot(tmp_path / "s", *small, extra=extra)
    assert main(["snapshot", "inspect", str(tmp_path / "s")]) == 0
    shown = capsys.readouterr().out
    for part in ("3: 'newest tokens', 'step'", "extra/newest tokens", "2x3", "scalar", "\\x1b[2J"):
        assert part in shown
    assert "\x1b" not in shown


REFUSED = {
    "no mapping": ([np.zeros(1)], TypeError, "must map names to arrays"),
    "a number for a name": ({7: np.zeros(1)}, TypeError, "names in extra must be str"),
    "a list": ({"a": [1]}, TypeError, "'a' is no array but list"),
    "a number": ({"a": 1}, TypeError, "'a' is no array but int"),
    "None": ({"a": None}, TypeError, "no array but NoneType"),
    "a masked array": ({"a": np.ma.ones(2)}, TypeError, "is a masked array"),
    "text": ({"a": np.array(["x"])}, NotImplementedError, "do not hold <U1"),
    "objects": ({"a": np.array([{}])}, NotImplementedError, "do not hold object"),
    "complex": ({"a": np.zeros(1, complex)}, NotImplementedError, "do not hold complex128"),
    "4 bits": ({"a": np.zeros(1, ml_dtypes.int4)}, NotImplementedError, "do not hold int4"),
    "a structure": ({"a": np.zeros(1, [("x", "f4")])}, NotImplementedError, "do not hold"),
    "a time": ({"a": np.zeros(1, "M8[s]")}, NotImplementedError, "do not hold datetime64"),
    "33 axes": ({"a": np.zeros((1,) * 33)}, ValueError, "it may have 32 axes"),
    "a long axis": ({"a": np.zeros((0, 2**31 + 1))}, ValueError, "reshape it"),
    "no name": ({"": np.zeros(1)}, ValueError, "a name is 1 to 249 bytes"),
    "a long name": ({"x" * 250: np.zeros(1)}, ValueError, "a name is 1 to 249 bytes"),
    "half a character": ({"\ud800": np.zeros(1)}, ValueError, "bytes of Unicode"),
    **{
        f"a path {ascii(name)}": ({name: np.zeros(1)}, ValueError, "without / ")
        for name in ("a/b", "/etc/passwd", "..", ".", "..\\x", "C:x", "a\0b")
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_cannot_hold_is_refused_before_anything_is_written(
    tmp_path, small, name, unchecked
):
    extra, error, text = REFUSED[name]
    for save in (save_snapshot, save_snapshot_async):
        with pytest.raises(error, match=text):
            save(tmp_path / "s", *small, extra=extra)
    assert not list(tmp_path.iterdir())


def test_keys_with_a_type_donated_arrays_and_traced_ones_are_refused(tmp_path, small):
    donated = jnp.zeros(4)
    jax.jit(lambda x: x + 1, donate_argnums=0)(donated)
    with pytest.raises(TypeError, match=r"pass what jax.random.key_data gives"):
        save_snapshot(tmp_path / "s", *small, extra={"a": jax.random.key(0)})
    with pytest.raises(RuntimeError, match="extra 'a' was deleted"):
        save_snapshot(tmp_path / "s", *small, extra={"a": donated})

    @jax.jit
    def traced(x):
        save_snapshot(tmp_path / "s", *small, extra={"a": x})

    with pytest.raises(TypeError, match="'a' is traced"):
        traced(jnp.zeros(2))
    assert not list(tmp_path.iterdir())


def named(name, array=None):
    return lambda arrays: arrays | {name: np.zeros(2) if array is None else array}


def entry(at, value):
    """Claim something else of `extra/flags`."""

    def change(fields):
        (mine,) = (each for each in fields["arrays"] if each[0] == "extra/flags")
        mine[at] = value

    return change


HOSTILE = {
    **{
        f"a path {ascii(name)}": (named(f"extra/{name}"), None, "is a path")
        for name in ("", ".", "..", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "C:x", "a\0")
    },
    "a name of 256 bytes": (named("extra/" + "x" * 250), None, "text of 1 to 255 bytes"),
    "a name that is bytes": (None, entry(0, b"extra/flags"), "text of 1 to 255 bytes"),
    "two of one name": (None, entry(0, "extra/a"), "two arrays have one name"),
    "an unknown dtype": (None, entry(1, "object"), "unknown dtype 'object'"),
    "a dtype of another case": (None, entry(1, "Bool"), "unknown dtype"),
    "33 axes": (None, entry(2, [1] * 33), "not a list of 0 to 32 axes"),
    "a negative axis": (None, entry(2, [-2]), "outside 0"),
    "an axis above 2**31": (None, entry(2, [2**31 + 1]), "outside 0"),
    "more than the file has": (None, entry(2, [2**31]), "checksums for"),
    "more than any memory": (None, entry(2, [2**31] * 32), "no array can have these axes"),
    "axes that NumPy cannot count": (None, entry(2, [0, *[2**31] * 3]), "no array can have these"),
    "an axis that is a float": (None, entry(2, [2.0]), "not an integer"),
    "one more chunk": (None, entry(3, bytes(8)), "8 bytes of checksums for 1 chunks"),
    "no checksum": (None, entry(3, b""), "0 bytes of checksums for 1 chunks"),
    "longer than it is": (None, entry(2, [65]), "the arrays end at byte"),
    "truth values among the bookkeeping": (
        named("sequence/cached", np.zeros(1, bool)),
        None,
        "unknown dtype 'bool'",
    ),
    "no axes among the bookkeeping": (
        named("sequence/cached", np.array(0)),
        None,
        "not a list of 1 to 8 axes",
    ),
    "truth values as keys": (named("kv/k", np.zeros((1, 1, 4, 1), bool)), None, "unknown dtype"),
    "groups that are none": (None, lambda f: f | {"groups": []}, "the header's keys are"),
    "another key": (None, lambda f: f | {"zzz": 1}, "the header's keys are"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_before_anything_is_touched(tmp_path, sample, name):
    fields, arrays = sample
    assert build(*sample)[8] == 3
    add, change, text = HOSTILE[name]
    data = build(fields, add(arrays) if add else arrays, change)
    refused_by_all(tmp_path, data, text)


def refused_by_all(tmp_path, data, text) -> None:
    path, folded = tmp_path / "hostile", tmp_path / "folded"
    path.write_bytes(data)
    cache, allocator = empty()
    for call in (
        inspect_snapshot,
        verify_snapshot,
        lambda p: load_snapshot(p, cache, allocator),
        lambda p: compact_snapshot(p, folded),
    ):
        with pytest.raises(SnapshotCorrupt, match=text):
            call(path)
    assert allocator.num_free == 8 and not folded.exists()


def test_a_version_says_whether_there_are_arrays_of_the_user(tmp_path, sample):
    """What an older release would misread has a number that it refuses."""
    fields, arrays = sample
    without = {n: a for n, a in arrays.items() if not n.startswith("extra/")}
    for version, some in ((1, arrays), (3, without)):
        data = bytearray(build(fields, some))
        refused_by_all(tmp_path, with_version(data, version), "arrays of the user are in a file of")


def with_version(data: bytearray, version: int) -> bytes:
    import zlib

    header_bytes = int.from_bytes(data[12:20], "little")
    data[8:12] = version.to_bytes(4, "little")
    checksum = zlib.crc32(data[:28] + data[32 : 32 + header_bytes])
    data[28:32] = checksum.to_bytes(4, "little")
    return bytes(data)


def test_every_bit_of_a_file_with_arrays_of_the_user_that_flips_is_noticed(
    tmp_path, sample, unchecked
):
    data, path = bytearray(build(*sample)), tmp_path / "flipped"
    begin = data.index(b"extra/flags")
    stored = data.index(np.arange(3).tobytes())
    for place in (*range(begin, begin + 24), *range(stored, stored + 24), stored + 64):
        for bit in range(8):
            data[place] ^= 1 << bit
            path.write_bytes(data)
            with pytest.raises(SnapshotCorrupt):
                verify_snapshot(path)
            data[place] ^= 1 << bit


def test_bytes_of_truth_values_that_are_not_0_or_1_are_true(tmp_path, sample):
    fields, arrays = sample
    odd = np.array([2, 0], np.uint8).view(bool)
    (tmp_path / "s").write_bytes(build(fields, arrays | {"extra/flags": odd}))
    found = load_snapshot(tmp_path / "s", *empty()).extra["flags"]
    assert found.tobytes() == b"\1\0" and found.dtype == bool
