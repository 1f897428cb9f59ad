"""Text to ids and back: the golden ids of the real vocabulary, and every rule on a tiny one."""

import json
from pathlib import Path

import pytest
from models import tokenizer
from models.gguf_reader import GGUFError
from tokenizers import Tokenizer

from .tiny_gguf import gguf_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2_greedy.json"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ["h e", "l l", "he ll", "hell o", "1 2"]
TEXTS = [
    "",
    "hello hello",
    "  two spaces 2024\n\n and 17 lines\t",
    "grüße, žluťoučký kůň, 你好, नमस्ते, 👩‍👩‍👧‍👦!",
    "a\u0000b\u007f\u00ad\ufffd",
]


def byte_spelling() -> list[str]:
    """Byte-level BPE writes byte b as this character, found by asking the library itself."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tiny_file(tmp_path, pre: str = "smollm", **changes) -> Path:
    words = ["he", "ll", "hell", "hello", "12", "whole"]
    special = ["<|im_start|>", "<|im_end|>"]
    tokens = [*special, *byte_spelling(), *words]
    metadata = {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", pre),
        "tokenizer.ggml.tokens": ("array:string", tokens),
        "tokenizer.ggml.token_type": ("array:i32", [3, 3] + [1] * (len(tokens) - 2)),
        "tokenizer.ggml.merges": ("array:string", MERGES),
        "tokenizer.ggml.bos_token_id": ("u32", 0),
        "tokenizer.ggml.eos_token_id": ("u32", 1),
        "tokenizer.ggml.add_bos_token": ("bool", False),
        "tokenizer.chat_template": ("string", CHATML),
    }
    metadata |= {key.replace("__", "."): entry for key, entry in changes.items()}
    path = tmp_path / f"{pre}.gguf"
    path.write_bytes(gguf_bytes({k: v for k, v in metadata.items() if v is not None}, {}))
    return path


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "smaug-bpe", "dbrx", "qwen2"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_survives_the_round_trip(tmp_path, pre, text):
    words = tokenizer.load(tiny_file(tmp_path, pre))
    assert words.decode(words.encode(text)) == text


def test_smollm_cuts_numbers_into_digits_and_the_others_do_not(tmp_path):
    spelt = {}
    for pre in ("smollm", "gpt-2", "llama-bpe"):
        words = tokenizer.load(tiny_file(tmp_path, pre))
        spelt[pre] = [words.tokens[i] for i in words.encode("hello 12")]
    assert spelt["smollm"] == ["hello", "Ġ", "1", "2"]
    assert spelt["gpt-2"] == spelt["llama-bpe"] == ["hello", "Ġ", "12"]


# The regular expression of the hub's tokenizer.json, by how many digits of a number it takes.
HUB = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def hub_tokenizer(words, pattern: str, *, composed: bool = False, whole: bool = False) -> Tokenizer:
    """What a tokenizer.json says, of the vocabulary of `tiny_file`."""
    split = dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)
    bytes_ = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    model = dict(type="BPE", vocab={text: i for i, text in enumerate(words.tokens)})
    model |= dict(merges=MERGES, ignore_merges=whole, fuse_unk=False, byte_fallback=False)
    model |= dict.fromkeys(("dropout", "unk_token"))
    model |= dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), "")
    said = dict(version="1.0", truncation=None, padding=None, added_tokens=[], model=model)
    said |= dict(normalizer=dict(type="NFC") if composed else None, post_processor=None)
    said |= dict(pre_tokenizer=dict(type="Sequence", pretokenizers=[split, bytes_]))
    said |= dict(decoder=bytes_)
    return Tokenizer.from_str(json.dumps(said))


@pytest.mark.parametrize(
    ("pre", "digits", "options"),
    [
        ("qwen2", r"\p{N}", dict(composed=True)),
        ("smaug-bpe", r"\p{N}{1,3}", dict(whole=True)),
        ("llama-bpe", r"\p{N}{1,3}", dict(whole=True)),
        ("dbrx", r"\p{N}{1,3}", dict()),
    ],
)
def test_ids_are_those_of_the_hubs_own_definition(tmp_path, pre, digits, options):
    path = tiny_file(tmp_path, pre, tokenizer__ggml__add_bos_token=("bool", False))
    words = tokenizer.load(path)
    theirs = hub_tokenizer(words, HUB % digits, **options)
    texts = ["I'LL he'll\r\n\n hello, hello!? \n", "12 1234 ١٢٣٤ ½", "cafe\u0301 \u212b n\u0303"]
    for text in [*TEXTS, *texts, "whole wholewhole", " whole\t\t12  hello   "]:
        assert words.encode(text) == theirs.encode(text).ids, text


def test_qwen_takes_digits_one_by_one_and_composes_letters(tmp_path):
    qwen, phi = (tokenizer.load(tiny_file(tmp_path, pre)) for pre in ("qwen2", "dbrx"))
    assert [qwen.tokens[i] for i in qwen.encode("12")] == ["1", "2"]
    assert [phi.tokens[i] for i in phi.encode("12")] == ["12"]
    assert qwen.encode("e\u0301") == qwen.encode("\u00e9") != phi.encode("e\u0301")


def test_only_llama_3_keeps_a_word_whole_to_which_no_merges_lead(tmp_path):
    for pre, whole in (("llama-bpe", True), ("smaug-bpe", True), ("dbrx", False), ("qwen2", False)):
        words = tokenizer.load(tiny_file(tmp_path, pre))
        assert ("whole" in [words.tokens[i] for i in words.encode("whole")]) == whole


def test_only_a_file_of_llama_3_that_says_nothing_begins_with_the_begin_token(tmp_path):
    for pre in ("llama-bpe", "smaug-bpe", "dbrx", "qwen2"):
        path = tiny_file(tmp_path, pre, tokenizer__ggml__add_bos_token=None)
        assert (tokenizer.load(path).encode("hello")[0] == 0) == (pre == "llama-bpe")


def test_text_up_to_half_a_character_ends_in_what_stands_for_it(tmp_path):
    words = tokenizer.load(tiny_file(tmp_path))
    ids = words.encode("é👩!")
    assert len(ids) == 7  # one token per byte
    texts = [words.decode(ids[:end]) for end in range(1, 8)]
    assert [end for end, text in enumerate(texts, 1) if text.endswith("\ufffd")] == [1, 3, 4, 5]
    assert texts[1] == "é" and texts[-2:] == ["é👩", "é👩!"]


def test_control_tokens_are_read_whole_and_written_never(tmp_path):
    words = tokenizer.load(tiny_file(tmp_path))
    ids = words.encode("<|im_start|>hello<|im_end|>")
    assert [words.tokens[i] for i in ids] == ["<|im_start|>", "hello", "<|im_end|>"]
    assert words.decode(ids) == "hello"
    assert words.eos_id == ids[-1]


def test_the_begin_token_comes_first_if_the_file_asks_for_it(tmp_path):
    words = tokenizer.load(tiny_file(tmp_path, tokenizer__ggml__add_bos_token=("bool", True)))
    assert words.encode("hello")[0] == 0


def test_a_chat_is_what_the_files_template_writes(tmp_path):
    words = tokenizer.load(tiny_file(tmp_path))
    text = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert words.chats and words.encode_chat("Q") == words.encode(text)
    turns = [("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "R")]
    messages = [dict(role=role, content=content) for role, content in turns]
    before = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    ids = words.encode(before + "<|im_start|>assistant\n")
    assert words.encode_chat(messages) == ids and ids.count(words.eos_id) == 4


def test_the_begin_token_of_a_chat_is_the_templates_own(tmp_path):
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    path = tiny_file(
        tmp_path,
        tokenizer__ggml__add_bos_token=("bool", True),
        tokenizer__chat_template=("string", template),
    )
    words = tokenizer.load(path)
    assert words.encode_chat("hello") == [*words.encode("hello"), words.eos_id]


def test_every_token_that_a_file_calls_an_end_is_one(tmp_path):
    words = tokenizer.load(tiny_file(tmp_path, tokenizer__ggml__eot_token_id=("u32", 0)))
    assert words.eos_ids == (1, 0) and words.eos_id == 1


def test_a_model_without_a_template_has_no_chats(tmp_path):
    words = tokenizer.load(tiny_file(tmp_path, tokenizer__chat_template=None))
    assert not words.chats
    with pytest.raises(ValueError, match="no chat template"):
        words.encode_chat("Q")


def test_an_unknown_pre_tokenizer_is_named_with_those_that_are_known(tmp_path):
    with pytest.raises(NotImplementedError, match="'tekken'.*'smollm', 'gpt-2', 'llama-bpe'"):
        tokenizer.load(tiny_file(tmp_path, "tekken"))


@pytest.mark.parametrize(
    "change",
    [
        dict(tokenizer__ggml__tokens=None),
        dict(tokenizer__ggml__tokens=("array:u8", [1, 2])),
        dict(tokenizer__ggml__tokens=("array:string", ["a", "b"])),
        dict(tokenizer__ggml__token_type=("array:i32", [1])),
        dict(tokenizer__ggml__merges=("array:string", ["a"])),
        dict(tokenizer__ggml__merges=("array:string", ["zz zz"])),
        dict(tokenizer__ggml__merges=("array:array:string", [["a", "b"]])),
        dict(tokenizer__ggml__eos_token_id=None),
        dict(tokenizer__ggml__eos_token_id=("string", "1")),
        dict(tokenizer__ggml__eos_token_id=("u32", 2**31)),
        dict(
            tokenizer__ggml__bos_token_id=("u32", 2**31),
            tokenizer__ggml__add_bos_token=("bool", True),
        ),
    ],
)
def test_entries_that_do_not_fit_together_are_one_kind_of_error(tmp_path, change):
    with pytest.raises(GGUFError):
        tokenizer.load(tiny_file(tmp_path, **change))


# ---- a scored vocabulary, as Gemma has


SPELT = "\u2581"  # a space


def scored_file(tmp_path, **changes) -> Path:
    """Tokens of one letter, what they make up in the order of making, whitespace, and bytes."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>"]
    own = ["\n\n", "  ", "   ", "<b>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    made = [f"{SPELT}t", "he", "th", f"{SPELT}the", "er", f"{SPELT}th"]
    letters = [*"abehrt\n", SPELT, "é"]
    tokens = [*control, *own, *bytes_, *made, *letters]
    types = [3] * len(control) + [4] * len(own) + [6] * 256 + [1] * (len(made) + len(letters))
    metadata = {
        "tokenizer.ggml.model": ("string", "llama"),
        "tokenizer.ggml.pre": ("string", "default"),
        "tokenizer.ggml.tokens": ("array:string", tokens),
        "tokenizer.ggml.token_type": ("array:i32", types),
        "tokenizer.ggml.bos_token_id": ("u32", 2),
        "tokenizer.ggml.eos_token_id": ("u32", 1),
        "tokenizer.ggml.add_space_prefix": ("bool", False),
    }
    metadata |= {key.replace("__", "."): entry for key, entry in changes.items()}
    path = tmp_path / "scored.gguf"
    path.write_bytes(gguf_bytes({k: v for k, v in metadata.items() if v is not None}, {}))
    return path


def pieces(words, text: str) -> list[str]:
    return [words.tokens[i] for i in words.encode(text)[1:]]


@pytest.mark.parametrize("text", TEXTS)
def test_a_scored_vocabulary_survives_the_round_trip_behind_its_begin_token(tmp_path, text):
    words = tokenizer.load(scored_file(tmp_path))
    ids = words.encode(text)
    assert ids[0] == 2 and words.decode(ids) == text
    assert not words.chats


def test_pairs_are_made_in_the_order_of_the_tokens(tmp_path):
    words = tokenizer.load(scored_file(tmp_path))
    assert pieces(words, " the") == [f"{SPELT}the"]  # of _t and he, which come before th
    assert pieces(words, "the") == ["t", "he"]
    assert pieces(words, " ther") == [f"{SPELT}the", "r"]


def test_runs_of_spaces_are_one_token_and_what_has_none_is_spelt_in_bytes(tmp_path):
    words = tokenizer.load(scored_file(tmp_path))
    assert pieces(words, "a   b") == ["a", "   ", "b"]
    assert pieces(words, "a\n\nb<b>") == ["a", "\n\n", "b", "<b>"]
    assert pieces(words, "éñ") == ["é", "<0xC3>", "<0xB1>"]
    assert pieces(words, "<eos>a") == ["<eos>", "a"] and words.decode([1, 2, 3]) == ""


def test_byte_tokens_are_a_character_when_the_last_of_it_has_come(tmp_path):
    words = tokenizer.load(scored_file(tmp_path))
    ids = words.encode("a 👩")[1:]
    texts = [words.decode(ids[:end]) for end in range(1, len(ids) + 1)]
    assert texts == ["a", "a ", "a \ufffd", "a \ufffd\ufffd", "a \ufffd\ufffd\ufffd", "a 👩"]


def test_the_bytes_of_all_tokens_are_those_of_the_text(tmp_path):
    for words in (tokenizer.load(tiny_file(tmp_path)), tokenizer.load(scored_file(tmp_path))):
        for text in TEXTS:
            assert b"".join(map(words.token_bytes, words.encode(text))) == text.encode()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(tokenizer__ggml__add_space_prefix=None), NotImplementedError, "space in front"),
        (dict(tokenizer__ggml__model=("string", "bert")), NotImplementedError, "'bert'"),
        (dict(tokenizer__ggml__tokens=("array:string", ["a"] * 279)), GGUFError, "every byte"),
        (dict(tokenizer__ggml__token_type=("array:i32", [1])), GGUFError, "as many types"),
        (dict(tokenizer__ggml__bos_token_id=None), GGUFError, "bos_token_id"),
    ],
)
def test_a_scored_vocabulary_that_is_not_served_or_not_whole_is_named(
    tmp_path, change, error, message
):
    with pytest.raises(error, match=message):
        tokenizer.load(scored_file(tmp_path, **change))


@pytest.mark.slow
def test_the_real_vocabulary_gives_the_golden_ids(real_gguf):
    words = tokenizer.load(real_gguf)
    for case in json.loads(GOLDEN.read_text())["cases"]:
        assert words.encode(case["text"]) == case["prompt_ids"], case["name"]
    chat = next(c for c in json.loads(GOLDEN.read_text())["cases"] if c["name"] == "chat")
    assert words.encode_chat("What is gravity? Answer in two sentences.") == chat["prompt_ids"]
    assert words.tokens[words.eos_id] == "<|im_end|>"
    for text in TEXTS:
        assert words.decode(words.encode(text)) == text
