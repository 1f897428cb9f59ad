"""Text and chats to token ids and back, for a GGUF file or a folder of a model hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as _Tokenizer

from .families import read_object
from .gguf_reader import read_gguf
from .gguf_vocabulary import SPACE, build

__all__ = ["ChatTemplate", "Message", "Tokenizer", "load"]

Message = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": its text}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")  # what templates know them by


def load(path: str | PathLike[str]) -> Tokenizer:
    """The tokenizer of a GGUF file, or of a folder with tokenizer.json.

    End tokens of a folder are all that tokenizer_config.json, special_tokens_map.json,
    generation_config.json and config.json name. Its chat template is chat_template.jinja, or that
    of tokenizer_config.json.

    Raises:
      ValueError: a file is not what it should be, or no end token is named.
      NotImplementedError: another kind of vocabulary; several chat templates without a default.
      OSError: a file cannot be read, or the folder has no tokenizer.json.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path)
    gguf = read_gguf(path)
    inner, tokens, eos_ids, special = build(gguf)
    text = gguf.value("tokenizer.chat_template", str, "")
    return Tokenizer(inner, tokens, eos_ids, ChatTemplate(path, text, special) if text else None)


class Tokenizer:
    """Token ids of texts and chats, and the text of ids.

    Attributes:
      tokens: the spelling of every token.
      eos_ids: the tokens that end an answer.
      eos_id: the first of them.
      chats: whether there is a chat template; a base model has none.
    """

    def __init__(
        self,
        inner: _Tokenizer,
        tokens: list[str],
        eos_ids: tuple[int, ...],
        template: ChatTemplate | None,
    ):
        self._inner, self.tokens, self.eos_ids, self._template = inner, tokens, eos_ids, template
        added = inner.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        self._has_bytes = inner.token_to_id("<0x0A>") is not None

    @property
    def eos_id(self) -> int:
        return self.eos_ids[0]

    @property
    def chats(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, behind the begin token if the model has one.

        Control tokens spelt out in the text count as such, here and in chats: remove them from
        text that is not to be trusted.
        """
        return self._inner.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, without control tokens; half a character ends in U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def encode_chat(self, messages: str | Sequence[Message]) -> list[int]:
        """Token ids of a chat in the model's own format, ready to be answered.

        Args:
          messages: of roles "system" (the first, if any), "user" and "assistant", in turns; a
            string is one of the user.

        Raises:
          ValueError: there is no chat template, or it refuses the messages, or is broken.
        """
        if self._template is None:
            raise ValueError("the model has no chat template: it continues texts, and has no turns")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self._template.render(messages)  # which spells the begin token itself
        return self._inner.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for; control tokens stand for nothing."""
        if token in self._special or not 0 <= token < len(self.tokens):
            return b""
        text = self.tokens[token]
        if self._has_bytes:
            return _BYTE_NAMES.get(text) or text.replace(SPACE, " ").encode()
        if all(char in _BYTE_OF for char in text):
            return bytes(_BYTE_OF[char] for char in text)
        return text.encode()  # a token that was added is spelt in plain text


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The program that a model's authors write chats with, in Jinja, as transformers runs it.

    It runs in jinja2's sandbox, reaches nothing of Python and no file, and changes nothing that
    it is given. How long it runs is not bounded.

    Attributes:
      path: the file that it is from.
      text: the program.
      special: the spelling of special tokens, by the names that it knows them by.
    """

    path: Path
    text: str
    special: Mapping[str, str]

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as text, up to where the answer begins.

        Raises:
          ValueError: it refuses the messages, uses what is not there, or what is not for it.
        """
        own = ["jinja2.ext.loopcontrols", _Generation]
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=own)
        # Jinja's own escapes what HTML does not like.
        environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
            value, ensure_ascii=ensure_ascii, **options
        )
        environment.globals |= dict(
            raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form)
        )
        given = dict(messages=[dict(message) for message in messages], tools=None, documents=None)
        try:
            template = environment.from_string(self.text)
            return template.render(**self.special, **given, add_generation_prompt=True)
        except Exception as error:  # of a program that others wrote: anything
            said = " ".join(str(error).split())
            raise ValueError(f"{self.path}: the chat template refuses or fails: {said}") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Jinja would only raise where the attribute is used."""
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is not for templates")


class _Generation(Extension):
    """`{% generation %}` marks the answers, for training; here it says nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _of_folder(folder: Path) -> Tokenizer:
    path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: vocabularies in other files are not read")
    try:
        inner = _Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises plain Exception
        raise ValueError(f"{path}: {error}") from error
    inner.no_truncation()  # which a file may ask for
    inner.no_padding()
    config, named = _entries(config_path), _entries(folder / "special_tokens_map.json")
    found = ((name, _spelling(config.get(name) or named.get(name))) for name in _SPECIAL)
    special = {name: text for name, text in found if text is not None}
    ends = [inner.token_to_id(special["eos_token"])] if "eos_token" in special else []
    for name in ("generation_config.json", "config.json"):
        found = _entries(folder / name).get("eos_token_id")
        ends += found if isinstance(found, list) else [found]
    ends = [i for i in ends if i is not None]
    if {*map(type, ends)} != {int} or min(ends) < 0:
        raise ValueError(f"{folder}: expected the ids of end tokens as 'eos_token_id', got {ends}")
    eos_ids = tuple(dict.fromkeys(ends))
    size = max(inner.get_vocab().values(), default=-1) + 1
    tokens = [inner.id_to_token(i) or "" for i in range(size)]
    return Tokenizer(inner, tokens, eos_ids, _template_of(folder, config_path, config, special))


def _template_of(
    folder: Path, path: Path, config: Mapping[str, Any], special: Mapping[str, str]
) -> ChatTemplate | None:
    text = config.get("chat_template")
    if (own := folder / "chat_template.jinja").is_file():
        path, text = own, own.read_text(encoding="utf-8")
    if isinstance(text, list):  # several, each with a name
        every = [each for each in text if isinstance(each, dict)]
        of_name = {each.get("name"): each.get("template") for each in every}
        if "default" not in of_name:
            raise NotImplementedError(f"{path}: no chat template is the default of {[*of_name]}")
        text = of_name["default"]
    if not isinstance(text, str | None):
        raise ValueError(f"{path}: expected a chat template as text, got {type(text).__name__}")
    return ChatTemplate(path, text, special) if text else None


def _entries(path: Path) -> dict[str, Any]:
    """The entries of a JSON file; none if there is no such file."""
    return read_object(path) if path.is_file() else {}


def _spelling(token: Any) -> str | None:
    """Of a token in a config: text, or an object with its content."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: visible Latin-1 characters stand for their own
    byte, all other bytes, in order, for the characters from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
_BYTE_NAMES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
