"""Model families from GGUF files, written against the public API of paged_decode.

Llama (SmolLM2, Mistral), Gemma 3 and gpt-oss: one configuration, one loader and one forward pass.

weights: fetch them · gguf_reader, quants: read the file · config: its sizes, and the cache's layout
· checkpoint: its weights · tokenizer: text to ids and back · decoder, experts: the forward pass ·
parallel: over several devices.
"""
