"""Models that people have, written against the public API of paged_decode.

One configuration and one forward pass for all families: a folder of a model hub (Llama, Mistral,
SmolLM, Qwen, Gemma, gpt-oss, Phi), or a GGUF file of them.

config: what a model is, and the cache's layout · families: that from config.json · checkpoint: its
weights · decoder: the forward pass · parallel: over several devices · tokenizer: text and
chats to ids and back · gguf_families, gguf_vocabulary, gguf_reader: the other kind of file
"""
