"""A byte-level tokenizer of as many ids as the tiny model has: pieces split characters anywhere."""

from __future__ import annotations

from collections.abc import Sequence

from .tiny import VOCAB

WORDS = ["", "ab", "é", "😀", "é", "e\u0301", "ß", " ", " the", ".\n", "中", "👩\u200d👩", "\ufffd"]
PIECES = [bytes([97 + i]) for i in range(24)]
PIECES += [word.encode() for word in WORDS]
PIECES += ["é".encode()[:1], "é".encode()[1:], "😀".encode()[:2], "😀".encode()[2:]]
PIECES += [bytes([byte]) for byte in "😀".encode()]
PIECES += ["b😀".encode()[:-1], "中c".encode()[1:], b"\xff", "中".encode()[:1]]
PIECES += [f"{a}{b}".encode() for a in "abc" for b in "abcd"]
assert len(PIECES) == VOCAB


def decode(ids: Sequence[int]) -> str:
    """As every byte-level tokenizer does."""
    return b"".join(PIECES[i] for i in ids).decode("utf-8", errors="replace")


def added(prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens behind a prompt that ends with a character."""
    before = decode(prompt)
    assert not before.endswith("\ufffd")
    return decode([*prompt, *tokens])[len(before) :]
