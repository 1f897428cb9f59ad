"""Text to token ids and back, from the vocabulary inside a GGUF file, by `tokenizers`."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any

from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as _Tokenizer

from .gguf_reader import GGUF, GGUFError, read_gguf

__all__ = ["StreamDecoder", "Tokenizer", "load"]

_CONTROL = 3  # token type: control tokens such as <|im_end|>, matched before anything else
_USER_DEFINED = 4
_SPACE = "\u2581"  # how a scored vocabulary writes one


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _llama3() -> pre_tokenizers.PreTokenizer:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


def _smollm() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _byte_level()])


# By `tokenizer.ggml.pre`: how text is cut before the merges. A wrong one still yields tokens,
# and quietly other ones, so an unknown name is refused.
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _smollm,
    "gpt-2": _byte_level,
    "llama-bpe": _llama3,
}


def load(path: str | PathLike[str]) -> Tokenizer:
    """Build the tokenizer of a GGUF file; raises as `read_gguf` and `Tokenizer` do."""
    return Tokenizer(read_gguf(path))


class Tokenizer:
    """The tokenizer that a GGUF file describes: byte-level BPE, or a scored vocabulary's (Gemma).

    Attributes:
      tokens: the spelling of every token.
      eos_id: the token that ends an answer.
      chats: whether the file has a chat template; a base model has none.

    Raises:
      NotImplementedError: another kind of vocabulary or pre-tokenizer.
      GGUFError: the entries are missing or do not fit together.

    Example:
      >>> tokenizer = load(path)  # doctest: +SKIP
      >>> tokenizer.encode("The capital of France is")  # doctest: +SKIP
      [504, 3575, 282, 4649, 314]
    """

    def __init__(self, gguf: GGUF):
        model = gguf.value("tokenizer.ggml.model", str)
        pre = gguf.value("tokenizer.ggml.pre", str, "default")
        scored = model == "llama" and not gguf.value("tokenizer.ggml.add_space_prefix", bool, True)
        if not scored and (model != "gpt2" or pre not in _PRE_TOKENIZERS):
            raise NotImplementedError(
                f"{gguf.path}: vocabulary {model!r} with pre-tokenizer {pre!r} is not served; "
                f"known are 'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}, and 'llama' "
                "without a space in front. The model itself can still be run on token ids"
            )
        tokens = gguf.value("tokenizer.ggml.tokens", list)
        types = gguf.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
        if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
            raise GGUFError(
                f"{gguf.path}: expected {len(tokens)} token strings and as many types, got "
                f"{len(types)} types"
            )
        self.tokens = tokens
        build = _build_scored if scored else _build_byte_level
        self._tokenizer, self._bytes_of = build(gguf, tokens, types), _said if scored else _spelt
        self._special = {i for i, kind in enumerate(types) if kind == _CONTROL}
        self._template = gguf.value("tokenizer.chat_template", str, "")
        self.chats = bool(self._template)
        add_bos = gguf.value("tokenizer.ggml.add_bos_token", bool, scored or pre == "llama-bpe")
        self._prefix = [gguf.value("tokenizer.ggml.bos_token_id", int)] if add_bos else []
        self.eos_id = gguf.value("tokenizer.ggml.eos_token_id", int)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, behind the begin token if the file asks for one.

        Control tokens spelt out in the text count as such: do not pass untrusted text through a
        chat template without removing them.
        """
        return self._prefix + self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, without control tokens."""
        stream = StreamDecoder(self)
        return "".join([*map(stream.push, ids), stream.flush()])

    def encode_chat(self, user: str, system: str | None = None) -> list[int]:
        """Token ids of one question in the file's chat format, ready to be answered.

        Raises:
          NotImplementedError: the file's template is not the `<|im_start|>` one.
        """
        if "<|im_start|>" not in self._template:
            raise NotImplementedError(
                "only the <|im_start|> chat template is served; format the prompt yourself"
            )
        if system is None:
            system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
        return self.encode(turns + "<|im_start|>assistant\n")

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for; control tokens stand for nothing."""
        if token in self._special or not 0 <= token < len(self.tokens):
            return b""
        return self._bytes_of(self.tokens[token])


class StreamDecoder:
    """Decode tokens as they come; text appears as soon as its UTF-8 bytes are complete.

    Example:
      >>> stream = StreamDecoder(tokenizer)  # doctest: +SKIP
      >>> print(*(stream.push(i) for i in ids), stream.flush(), sep="")  # doctest: +SKIP
      Hello, world
    """

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        return self._utf8.decode(self._token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character was never completed."""
        return self._utf8.decode(b"", final=True)


def _build_byte_level(gguf: GGUF, tokens: list[str], types: Sequence[int]) -> _Tokenizer:
    pre = gguf.value("tokenizer.ggml.pre", str)
    listed = gguf.value("tokenizer.ggml.merges", list)
    if not all(isinstance(merge, str) for merge in listed):
        raise GGUFError(f"{gguf.path}: expected merges as strings")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in listed]
    # Llama 3 keeps a word whole that is in its vocabulary, even if no merges lead there.
    tokenizer = _bpe(gguf, vocab, merges, ignore_merges=pre == "llama-bpe")
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    _add_whole(tokenizer, _of_type(_CONTROL, tokens, types), _of_type(_USER_DEFINED, tokens, types))
    return tokenizer


def _build_scored(gguf: GGUF, tokens: list[str], types: Sequence[int]) -> _Tokenizer:
    """SentencePiece's BPE: every pair that makes a token is a merge, in the order of the tokens.

    The file's scores are that order too, but for tokens of whitespace, which have none.
    """
    written = [
        text.replace(" ", _SPACE) if kind == _USER_DEFINED else text
        for text, kind in zip(tokens, types, strict=True)
    ]
    vocab = {text: i for i, text in enumerate(written)}
    if missing := [name for name in _BYTE_NAMES if name not in vocab]:
        raise GGUFError(
            f"{gguf.path}: expected a token for every byte, such as {missing[0]!r}, without which "
            f"some texts cannot be spelt; {len(missing)} are missing"
        )
    merges = [
        (text[:at], text[at:])
        for text in written
        for at in range(len(text) - 1, 0, -1)  # the longer beginning first
        if text[:at] in vocab and text[at:] in vocab
    ]
    tokenizer = _bpe(gguf, vocab, merges, byte_fallback=True)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    own = [text for text in _of_type(_USER_DEFINED, tokens, types) if text.strip(" ")]
    _add_whole(tokenizer, _of_type(_CONTROL, tokens, types), own)
    return tokenizer


def _of_type(kind: int, tokens: list[str], types: Sequence[int]) -> list[str]:
    return [text for text, its in zip(tokens, types, strict=True) if its == kind]


def _bpe(gguf: GGUF, vocab: dict[str, int], merges: list[Any], **options: Any) -> _Tokenizer:
    try:
        return _Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the binding raises plain Exception
        raise GGUFError(
            f"{gguf.path}: the vocabulary and its merges do not fit: {error}"
        ) from error


def _add_whole(tokenizer: _Tokenizer, control: Iterable[str], own: Iterable[str]) -> None:
    """Tokens that are found in a text before anything is cut."""
    for texts, special in ((control, True), (own, False)):
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=special) for t in texts])


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: visible Latin-1 characters stand for their own
    byte, all other bytes, in order, for the characters from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
_BYTE_NAMES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


def _spelt(text: str) -> bytes:
    """What a token of a byte-level vocabulary stands for."""
    if all(char in _BYTE_OF for char in text):
        return bytes(_BYTE_OF[char] for char in text)
    return text.encode()  # a user-defined token is spelt in plain text


def _said(text: str) -> bytes:
    """What a token of a scored vocabulary stands for."""
    return _BYTE_NAMES.get(text) or text.replace(_SPACE, " ").encode()
