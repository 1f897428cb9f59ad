"""A trace is read whole and right, or the line that is wrong is named."""

import gzip
import json
import os
import re

import pytest

from paged_decode.pressure import read_azure, read_mooncake

GOOD = {"timestamp": 5, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}
HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:15:46.6805900,374,44\n"


def refused(read, path, content, line):
    """The message about a file with this content, which names the line."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(f"{path}, line {line}: ")) as caught:
        list(read(path))
    return str(caught.value)


def rows(*changes):
    return "".join(json.dumps(GOOD | change) + "\n" for change in changes)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("inf"), -1, "5", True, None, [], {}, 1.5j],
    ids=lambda bad: repr(bad),
)
def test_a_wrong_field_of_mooncake_is_refused(tmp_path, name, bad):
    if isinstance(bad, complex):
        row = rows({name: 1}).replace(f'"{name}": 1', f'"{name}": 1e999')
    else:
        row = rows({name: bad})
    refused(read_mooncake, tmp_path / "trace", rows({}) + row, 2)


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_field_of_mooncake_is_named(tmp_path, name):
    row = {key: value for key, value in GOOD.items() if key != name}
    assert name in refused(read_mooncake, tmp_path / "trace", json.dumps(row), 1)


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        "nonsense",
        '"text"',
        "[" * 100_000,
        rows({"input_length": 1025}),
        rows({"input_length": 512}),
        rows({"hash_ids": [1, 2.0]}),
        rows({"hash_ids": [1, True]}),
        rows({"hash_ids": [1, 2**30]}),
        rows({"timestamp": 1700000000000}),
        rows({"output_length": 10**30}),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path, line):
    assert "no Mooncake request" in refused(read_mooncake, tmp_path / "trace", line, 1)


def test_lines_must_be_in_order_of_time(tmp_path):
    late = rows({}, {"timestamp": 7}, {"timestamp": 6})
    assert "sort" in refused(read_mooncake, tmp_path / "trace", late, 3)
    early = HEAD + ROW + ROW.replace("46.68", "45.68")
    assert "sort" in refused(read_azure, tmp_path / "trace", early, 3)


@pytest.mark.parametrize(
    "row",
    [
        *(
            ROW.replace("374", bad)
            for bad in ("NaN", "inf", "-3", "3.5", "", "True", "0", "9" * 30)
        ),
        *(ROW.replace(",44", bad) for bad in (",-1", ",x", ",", "", ",44,5")),
        *(f"{when},3,4\n" for when in ("nan", "", "5", "2023-13-01", "tomorrow")),
        '2023-11-16 18:15:46,"374,44\n',
    ],
)
def test_a_row_that_is_no_azure_request_is_named(tmp_path, row):
    assert "no Azure request" in refused(read_azure, tmp_path / "trace", HEAD + row, 2)


@pytest.mark.parametrize("head", ["", ROW, HEAD.replace(",", ";"), HEAD.replace("Con", "con")])
def test_a_table_without_its_header_is_refused(tmp_path, head):
    assert "TIMESTAMP,ContextTokens" in refused(read_azure, tmp_path / "trace", head, 1)


def test_zones_are_all_or_none(tmp_path):
    zoned = ROW.replace("900", "900+00:00")
    refused(read_azure, tmp_path / "trace", HEAD + ROW + zoned, 3)
    (tmp_path / "trace").write_text(HEAD + zoned + "\n" + zoned.replace(":46.", ":47."))
    assert [r.arrival_seconds for r in read_azure(tmp_path / "trace")] == [0.0, 1.0]


@pytest.mark.parametrize("read, text", [(read_mooncake, rows({})), (read_azure, HEAD + ROW)])
@pytest.mark.parametrize(
    "content",
    [lambda text, code=code: text.encode(code) for code in ("utf-16", "utf-16-le", "utf-8-sig")]
    + [
        lambda text: b"",
        lambda text: b"\n",
        lambda text: bytes(range(256)) * 4,
        lambda text: b"\0" * 1000,
        lambda text: "caf\u00e9\n".encode("latin-1") + text.encode(),
    ],
)
def test_what_is_no_text_of_utf_8_is_refused(tmp_path, read, text, content):
    (tmp_path / "trace").write_bytes(content(text))
    with pytest.raises(ValueError, match="trace, line 1: "):
        list(read(tmp_path / "trace"))


@pytest.mark.parametrize("read, text", [(read_mooncake, rows({})), (read_azure, HEAD + ROW)])
def test_a_compressed_trace_is_to_be_unpacked(tmp_path, read, text):
    (tmp_path / "trace").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match="line 1: .*gzip; unpack it"):
        list(read(tmp_path / "trace"))


def test_a_byte_of_latin_1_is_named_with_its_line(tmp_path):
    text = (rows({}) + '{"n\u00e4me": 1}').encode("latin-1")
    assert "expected UTF-8" in refused(read_mooncake, tmp_path / "trace", text, 2)


@pytest.mark.parametrize("read", [read_mooncake, read_azure])
def test_what_is_no_file_or_has_no_lines_does_not_hold_up(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="regular file"):
            next(read(path))
    (tmp_path / "long").write_bytes(b" " * (2**24 + 5))
    with pytest.raises(ValueError, match="long, line 1: expected lines of less"):
        next(read(tmp_path / "long"))
    with pytest.raises(FileNotFoundError):
        next(read(tmp_path / "none"))


def test_empty_lines_and_outputs_of_no_token_are_borne(tmp_path):
    (tmp_path / "m").write_text("\n" + rows({}, {"output_length": 0}) + "\n\n")
    assert [r.output_tokens for r in read_mooncake(tmp_path / "m")] == [1, 1]
    (tmp_path / "a").write_text(HEAD + "\n" + ROW + "\r\n" + ROW)
    assert [r.prompt_tokens for r in read_azure(tmp_path / "a")] == [374, 374]


def test_times_of_mooncake_count_from_the_first_request(tmp_path):
    lines = [
        f'{{"timestamp": {at}, "input_length": 5, "output_length": 2, "hash_ids": [1]}}\n'
        for at in (3_600_000, 3_600_500)
    ]
    (tmp_path / "trace").write_text("".join(lines))
    assert [r.arrival_seconds for r in read_mooncake(tmp_path / "trace")] == [0.0, 0.5]
