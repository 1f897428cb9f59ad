"""The vocabulary inside a GGUF file, as `tokenizers` builds it: byte-level BPE, or a scored one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from .gguf_reader import GGUF, GGUFError

__all__ = ["SPACE", "build"]

SPACE = "\u2581"  # how a scored vocabulary writes one
_CONTROL = 3  # token type: control tokens such as <|im_end|>, matched before anything else
_USER_DEFINED = 4
_SPECIAL = dict(bos_token="bos", eos_token="eos", unk_token="unknown", pad_token="padding")


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _words(digits: int) -> pre_tokenizers.PreTokenizer:
    """Words with what goes before them, and numbers of so many digits."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{digits}}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


def _smollm() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _byte_level()])


# By `tokenizer.ggml.pre`: how text is cut before the merges. A wrong one still yields tokens,
# and quietly other ones, so an unknown name is refused. SmolLM3 is "smaug-bpe", Phi-4 "dbrx".
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _smollm,
    "gpt-2": _byte_level,
    "llama-bpe": partial(_words, 3),
    "smaug-bpe": partial(_words, 3),
    "dbrx": partial(_words, 3),
    "qwen2": partial(_words, 1),
}
# Llama 3's vocabulary, that begins with <bos> or not: a word that it has is kept whole, even if no
# merges lead there.
_WHOLE_WORDS = ("llama-bpe", "smaug-bpe")


def build(gguf: GGUF) -> tuple[Tokenizer, list[str], tuple[int, ...], dict[str, str]]:
    """The tokenizer of a file, the spelling of every token, the tokens that end an answer, and the
    spelling of special ones by the names that chat templates know them by.

    Raises:
      NotImplementedError: another kind of vocabulary or pre-tokenizer.
      GGUFError: the entries are missing or do not fit together.
    """
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
    tokenizer = (_build_scored if scored else _build_byte_level)(gguf, tokens, types)
    if gguf.value("tokenizer.ggml.add_bos_token", bool, scored or pre == "llama-bpe"):
        begin = _token_id(gguf, "bos", tokens)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[begin], "$A"], special_tokens=[(tokens[begin], begin)]
        )
    ends = {_token_id(gguf, "eos", tokens): None}  # a set in order
    ends |= dict.fromkeys(_special_id(gguf, name) for name in ("eot", "eom"))
    special = {
        template_name: tokens[i]
        for template_name, name in _SPECIAL.items()
        if 0 <= (i := _special_id(gguf, name)) < len(tokens)
    }
    return tokenizer, tokens, tuple(i for i in ends if i >= 0), special


def _special_id(gguf: GGUF, name: str) -> int:
    return gguf.value(f"tokenizer.ggml.{name}_token_id", int, -1)


def _token_id(gguf: GGUF, name: str, tokens: list[str]) -> int:
    """Of a token that there must be."""
    if not 0 <= (found := _special_id(gguf, name)) < len(tokens):
        raise GGUFError(f"{gguf.path}: expected a {name}_token_id below {len(tokens)}, got {found}")
    return found


def _build_byte_level(gguf: GGUF, tokens: list[str], types: Sequence[int]) -> Tokenizer:
    pre = gguf.value("tokenizer.ggml.pre", str)
    listed = gguf.value("tokenizer.ggml.merges", list)
    if not all(isinstance(merge, str) for merge in listed):
        raise GGUFError(f"{gguf.path}: expected merges as strings")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in listed]
    tokenizer = _bpe(gguf, vocab, merges, ignore_merges=pre in _WHOLE_WORDS)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = _PRE_TOKENIZERS[pre](), decoders.ByteLevel()
    _add_whole(tokenizer, _of_type(_CONTROL, tokens, types), _of_type(_USER_DEFINED, tokens, types))
    return tokenizer


def _build_scored(gguf: GGUF, tokens: list[str], types: Sequence[int]) -> Tokenizer:
    """SentencePiece's BPE: every pair that makes a token is a merge, in the order of the tokens.

    The file's scores are that order too, but for tokens of whitespace, which have none.
    """
    written = [
        text.replace(" ", SPACE) if kind == _USER_DEFINED else text
        for text, kind in zip(tokens, types, strict=True)
    ]
    vocab = {text: i for i, text in enumerate(written)}
    if missing := [name for name in map("<0x{:02X}>".format, range(256)) if name not in vocab]:
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
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    own = [text for text in _of_type(_USER_DEFINED, tokens, types) if text.strip(" ")]
    _add_whole(tokenizer, _of_type(_CONTROL, tokens, types), own)
    return tokenizer


def _of_type(kind: int, tokens: list[str], types: Sequence[int]) -> list[str]:
    return [text for text, its in zip(tokens, types, strict=True) if its == kind]


def _bpe(gguf: GGUF, vocab: dict[str, int], merges: list[Any], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the binding raises plain Exception
        raise GGUFError(
            f"{gguf.path}: the vocabulary and its merges do not fit: {error}"
        ) from error


def _add_whole(tokenizer: Tokenizer, control: Iterable[str], own: Iterable[str]) -> None:
    """Tokens that are found in a text before anything is cut."""
    for texts, special in ((control, True), (own, False)):
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=special) for t in texts])
