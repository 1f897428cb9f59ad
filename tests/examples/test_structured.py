"""JSON by a schema: whatever the model would have said, what it says is valid."""

from __future__ import annotations

import json

import pytest
import structured

from paged_decode import SamplingParams

SCHEMA = structured.SCHEMA["properties"]


def is_valid(answer: dict) -> bool:
    """By the schema of the example, told in Python."""
    words = answer["words"]
    return (
        list(answer) == ["name", "kind", "size_in_metres", "words"]
        and 1 <= len(answer["name"]) <= 40
        and answer["kind"] in SCHEMA["kind"]["enum"]
        and 0 <= answer["size_in_metres"] <= 9999
        and 1 <= len(words) <= 3
        and all(isinstance(word, str) and len(word) <= 20 for word in words)
    )


@pytest.mark.long
def test_every_answer_is_json_of_the_schema_however_hot_and_others_are_as_they_are_alone(real_gguf):
    engine, own = structured.make(real_gguf, rows=8, tokens=256)
    mask = structured.json_grammar(own, engine.config.vocab_size, structured.SCHEMA)
    prompts = [own.encode_chat(text) for text in structured.PROMPTS]
    plain = SamplingParams(max_new_tokens=24, ignore_eos=True)
    (alone,) = engine.generate(prompts[:1], plain)
    free = engine.submit(prompts[0], plain)
    asked = [
        engine.submit(prompt, SamplingParams(200, heat, seed=seed), mask=mask)
        for seed, prompt in enumerate(prompts)
        for heat in (0.0, 3.0)
    ]
    said: dict[int, list[int]] = {request: [] for request in (free, *asked)}
    for event in engine.stream():
        if event.token is not None:
            said[event.request_id].append(event.token)
        assert event.finish_reason in (None, "stop", "length")
    assert tuple(said[free]) == alone.tokens
    for request in asked:
        assert is_valid(json.loads(own.decode(said[request])))
    assert engine.allocator.num_used == 0
