"""Folders of a model hub: the tokenizer, the end tokens, and chat templates that others wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import tokenizer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]
TEXTS = ["", "hello hello", "  two spaces 2024\n\n\t", "grüße, 你好, 👩‍👩‍👧‍👦!", "a\u0000b\ufffd"]
CHAT = [
    dict(role="system", content="Be brief."),
    dict(role="user", content=" What? "),
    dict(role="assistant", content="That."),
    dict(role="user", content="Why?"),
]

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""  # noqa: E501
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def byte_level() -> Tokenizer:
    """All bytes, a few merges, control tokens, and one plain token that was added."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = ["he", "ll", "hell", "hello"]
    vocab = {text: i for i, text in enumerate([*letters, *made])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    built = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    built.add_tokens([AddedToken("<think>", normalized=False)])
    begin = SPECIAL[0]
    built.post_processor = processors.TemplateProcessing(
        single=[begin, "$A"], special_tokens=[(begin, built.token_to_id(begin))]
    )
    return built


def scored() -> Tokenizer:
    """As Llama 2 and Gemma have them: spaces are ▁, and what has no token is spelt in bytes."""
    texts = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"ehlo", "he", "ll", "▁he"]
    merges = [("h", "e"), ("l", "l"), ("▁", "he")]
    vocab = {text: i for i, text in enumerate(texts)}
    built = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    built.add_special_tokens(SPECIAL)
    return built


def folder(path: Path, built: Tokenizer | None = None, **files: Any) -> Path:
    """Writes files by their names without the ending: JSON, or the text of a template."""
    (built or byte_level()).save(str(path / "tokenizer.json"))
    files = dict(tokenizer_config=dict(bos_token=SPECIAL[0], eos_token=SPECIAL[1])) | files
    for name, content in files.items():
        ending, text = (
            ("jinja", content) if name == "chat_template" else ("json", json.dumps(content))
        )
        (path / f"{name}.{ending}").write_text(text, encoding="utf-8")
    return path


def with_template(path: Path, template: str) -> tokenizer.Tokenizer:
    return tokenizer.load(folder(path, chat_template=template))


@pytest.mark.parametrize("build", [byte_level, scored])
def test_a_text_survives_the_round_trip_and_its_tokens_are_its_bytes(tmp_path, build):
    words = tokenizer.load(folder(tmp_path, build()))
    assert not words.chats
    for text in TEXTS:
        ids = words.encode(text)
        assert words.decode(ids) == text
        space = b" " if build is scored and text else b""  # which this vocabulary puts in front
        assert b"".join(map(words.token_bytes, ids)) == space + text.encode()


def test_the_begin_token_comes_where_the_file_says_and_control_tokens_are_not_text(tmp_path):
    words = tokenizer.load(folder(tmp_path))
    ids = words.encode("<think>hello<|end|>")
    assert [words.tokens[i] for i in ids] == ["<|begin|>", "<think>", "hello", "<|end|>"]
    assert words.decode(ids) == "<think>hello" and words.token_bytes(ids[1]) == b"<think>"
    assert words.decode([*ids, len(words.tokens) + 7]) == "<think>hello"  # padding of the logits


def test_prompts_are_never_cut_or_padded_though_the_file_asks_for_it(tmp_path):
    built = byte_level()
    built.enable_truncation(2)
    built.enable_padding(length=50)
    words = tokenizer.load(folder(tmp_path, built))
    assert words.decode(words.encode("hello you")) == "hello you"
    assert len(words.encode("hello")) == 2


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, ["<|end|>"]),
        (dict(generation_config=dict(eos_token_id=3)), ["<|end|>", 3]),
        (
            dict(generation_config=dict(eos_token_id=[7, 3]), config=dict(eos_token_id=3)),
            ["<|end|>", 7, 3],
        ),
        (dict(tokenizer_config={}, config=dict(eos_token_id=4)), [4]),
        (dict(tokenizer_config=dict(eos_token={"content": "<|eot_id|>"})), ["<|eot_id|>"]),
        (
            dict(tokenizer_config={}, special_tokens_map=dict(eos_token="<end_of_turn>")),
            ["<end_of_turn>"],
        ),
        (dict(tokenizer_config=dict(eos_token=None), config=dict(eos_token_id=[0])), [0]),
    ],
)
def test_every_token_that_a_file_calls_an_end_is_one(tmp_path, files, ends):
    words = tokenizer.load(folder(tmp_path, **files))
    ends = [words.tokens.index(end) if isinstance(end, str) else end for end in ends]
    assert list(words.eos_ids) == ends and words.eos_id == ends[0]


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (dict(tokenizer_config={}), ValueError, "end"),
        (dict(tokenizer_config=[]), ValueError, "tokenizer_config.json: expected an object"),
        (dict(config=dict(eos_token_id="2")), ValueError, "end"),
        (dict(generation_config=dict(eos_token_id=[-1])), ValueError, "end"),
        (dict(generation_config=dict(eos_token_id=[[1]])), ValueError, r"eos_token_id.*\[1\]"),
        (dict(config=dict(eos_token_id=True)), ValueError, "eos_token_id.*True"),
        (dict(tokenizer_config=dict(eos_token="<|end|>", chat_template=7)), ValueError, "as text"),
        (
            dict(
                tokenizer_config=dict(
                    eos_token="<|end|>", chat_template=[dict(name="rag", template="x")]
                )
            ),
            NotImplementedError,
            "tokenizer_config.json.*'rag'",
        ),
    ],
)
def test_files_that_are_not_what_they_should_be_are_named(tmp_path, files, error, message):
    with pytest.raises(error, match=message):
        tokenizer.load(folder(tmp_path, **files))


def test_a_folder_without_a_whole_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        tokenizer.load(tmp_path)
    (folder(tmp_path) / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        tokenizer.load(tmp_path)


# ---- chats


def test_chatml(tmp_path):
    words = with_template(tmp_path, CHATML)
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n What? <|im_end|>\n"
    text += "<|im_start|>assistant\nThat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    ids = words.encode(text + "<|im_start|>assistant\n")
    assert words.chats and words.encode_chat(CHAT) == ids[1:]  # nobody wrote the begin token


def test_llama_3_has_one_begin_token_and_trims(tmp_path):
    words = with_template(tmp_path, LLAMA3)
    turns = [(m["role"], m["content"].strip()) for m in CHAT]
    text = "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{said}<|eot_id|>" for role, said in turns
    )
    text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert words.encode_chat(CHAT) == words.encode(text)
    assert words.encode_chat(CHAT).count(words.encode("")[0]) == 1


def test_gemma_has_no_system_and_its_own_name_for_who_answers(tmp_path):
    words = with_template(tmp_path, GEMMA)
    text = "<start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\nThat.<end_of_turn>\n"
    text += "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    assert words.encode_chat(CHAT[1:]) == words.encode(text)
    with pytest.raises(ValueError, match=r"chat_template\.jinja.*System role not supported"):
        words.encode_chat(CHAT)
    with pytest.raises(ValueError, match="must alternate"):
        words.encode_chat(CHAT[1:3] * 2 + CHAT[2:3])


def test_a_template_file_comes_before_the_config_and_of_several_the_default(tmp_path):
    config = dict(eos_token=SPECIAL[1], chat_template="one")
    words = tokenizer.load(folder(tmp_path, tokenizer_config=config))
    assert words.decode(words.encode_chat("Q")) == "one"
    config["chat_template"] = [
        dict(name="rag", template="two"),
        dict(name="default", template="3{{ eos_token }}"),
    ]
    words = tokenizer.load(folder(tmp_path, tokenizer_config=config))
    assert words.decode(words.encode_chat("Q")) == "3"
    assert words.encode_chat("Q")[-1] == words.eos_id
    assert words.decode(with_template(tmp_path, "four").encode_chat("Q")) == "four"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ ['é'] | tojson(ensure_ascii=true, indent=1) }}", '[\n "\\u00e9"\n]'),
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "Q"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Q!"),
        ("  {% if true %}\nyes\n  {% endif %}\n", "yes\n"),
        ("{{ tools is none }}{{ documents is none }}{{ missing }}", "TrueTrue"),
        ("{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}", "2"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_templates_have_what_transformers_gives_them(tmp_path, template, text):
    words = with_template(tmp_path, template)
    assert words.decode(words.encode_chat("Q")) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update(content='x') %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ open('/etc/passwd') }}",
        "{{ no_such_function() }}",
        "{{ missing.attribute }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% if %}",
        "{{ 'x' | no_such_filter }}",
        "{% no_such_tag %}",
    ],
)
def test_a_template_that_breaks_out_or_breaks_is_refused_with_its_file(tmp_path, template):
    words = with_template(tmp_path, template)
    messages = [dict(role="user", content="Q")]
    with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template") as caught:
        words.encode_chat(messages)
    assert messages == [dict(role="user", content="Q")]
    assert len(str(caught.value).splitlines()) == 1
