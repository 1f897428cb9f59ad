"""A Llama-family model from a GGUF file, written against the public API of paged_decode.

weights: fetch the demo's model · gguf_reader, quants: read the file · checkpoint: its sizes and
weights · tokenizer: text to ids and back · decoder: the forward pass.
"""
