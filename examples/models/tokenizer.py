"""Text to token ids and back, from the vocabulary inside a GGUF file, by `tokenizers`."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from os import PathLike

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as _Tokenizer

from .gguf_reader import GGUF, GGUFError, read_gguf

__all__ = ["StreamDecoder", "Tokenizer", "load"]

_CONTROL = 3  # token type: control tokens such as <|im_end|>, matched before anything else
_USER_DEFINED = 4


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
    """The byte-level BPE tokenizer that a GGUF file describes.

    Attributes:
      tokens: the spelling of every token.
      eos_id: the token that ends an answer.

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
        if model != "gpt2" or pre not in _PRE_TOKENIZERS:
            raise NotImplementedError(
                f"{gguf.path}: vocabulary {model!r} with pre-tokenizer {pre!r} is not served; "
                f"known are 'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}. The model itself "
                "can still be run on token ids"
            )
        tokens = gguf.value("tokenizer.ggml.tokens", list)
        types = gguf.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
        if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
            raise GGUFError(
                f"{gguf.path}: expected {len(tokens)} token strings and as many types, got "
                f"{len(types)} types"
            )
        self.tokens = tokens
        self._tokenizer = _build(gguf, tokens, types, pre)
        self._special = {i for i, kind in enumerate(types) if kind == _CONTROL}
        self._template = gguf.value("tokenizer.chat_template", str, "")
        add_bos = gguf.value("tokenizer.ggml.add_bos_token", bool, pre == "llama-bpe")
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
        text = self.tokens[token]
        if all(char in _BYTE_OF for char in text):
            return bytes(_BYTE_OF[char] for char in text)
        return text.encode()  # a user-defined token is spelt in plain text


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


def _build(gguf: GGUF, tokens: list[str], types: Sequence[int], pre: str) -> _Tokenizer:
    listed = gguf.value("tokenizer.ggml.merges", list)
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        merges = [tuple(merge.split(" ")) for merge in listed]
        # Llama 3 keeps a word whole that is in its vocabulary, even if no merges lead there.
        bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
        tokenizer = _Tokenizer(bpe)
    except Exception as error:  # the binding raises plain Exception
        raise GGUFError(
            f"{gguf.path}: the vocabulary and its merges do not fit: {error}"
        ) from error
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [t for t, of_kind in zip(tokens, types, strict=True) if of_kind == kind]
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=special) for t in added])
    return tokenizer


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: visible Latin-1 characters stand for their own
    byte, all other bytes, in order, for the characters from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
