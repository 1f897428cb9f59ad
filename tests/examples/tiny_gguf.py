"""Write small GGUF files byte by byte, independently of the reader and of the `gguf` package."""

import struct
from pathlib import Path

import numpy as np

# By GGUF value type: how one value is packed.
_FORMATS = dict(u8="B", i8="b", u16="H", i16="h", u32="I", i32="i", f32="f", bool="?", string="")
_FORMATS |= dict(array="", u64="Q", i64="q", f64="d")
TYPES = {name: number for number, name in enumerate(_FORMATS)}


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind: str, content) -> bytes:
    if kind == "string":
        return string(content)
    if kind.startswith("array:"):
        item = kind.removeprefix("array:")
        head = struct.pack("<IQ", TYPES[item.split(":")[0]], len(content))
        return head + b"".join(value(item, c) for c in content)
    return struct.pack("<" + _FORMATS[kind], content)


def gguf_bytes(
    metadata: dict[str, tuple[str, object]],
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]],
    *,
    version: int = 3,
    align: int = 32,
) -> bytes:
    """`metadata`: key -> (kind, content); `tensors`: name -> (ggml type, shape, raw bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, content) in metadata.items():
        number = TYPES[kind.split(":")[0]]
        head += string(key) + struct.pack("<I", number) + value(kind, content)
    data = b""
    for name, (ggml_type, shape, raw) in tensors.items():
        data += bytes(-len(data) % align)
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", ggml_type, len(data))
        data += raw
    return head + bytes(-len(head) % align) + data


def f32(array) -> tuple[int, tuple[int, ...], bytes]:
    array = np.asarray(array, np.float32)
    return 0, array.shape, array.tobytes()


# ---- a Llama small enough to be computed by hand

VOCAB, WIDTH, INNER, LAYERS, HEADS, KV_HEADS, DIM = 29, 24, 32, 2, 6, 2, 4


def llama_metadata(**changes) -> dict[str, tuple[str, object]]:
    sizes = {
        "block_count": LAYERS,
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": DIM,
    }
    metadata: dict[str, tuple[str, object]] = {"general.architecture": ("string", "llama")}
    metadata |= {f"llama.{key}": ("u32", size) for key, size in sizes.items()}
    metadata["llama.rope.freq_base"] = ("f32", 100.0)
    metadata["llama.attention.layer_norm_rms_epsilon"] = ("f32", 1e-5)
    return metadata | changes


def llama_weights(seed: int = 0, *, tied: bool = True) -> dict[str, np.ndarray]:
    """Random weights `(out, in)`, Q and K with half-split heads, not permuted yet."""
    rng = np.random.default_rng(seed)

    def matrix(out: int, of: int) -> np.ndarray:
        return (rng.standard_normal((out, of)) / of**0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(WIDTH)).astype(np.float32)

    weights = {"token_embd": 3 * matrix(VOCAB, WIDTH), "output_norm": norm()}
    if not tied:
        weights["output"] = matrix(VOCAB, WIDTH)
    for i in range(LAYERS):
        weights |= {
            f"blk.{i}.attn_norm": norm(),
            f"blk.{i}.attn_q": 2 * matrix(HEADS * DIM, WIDTH),
            f"blk.{i}.attn_k": 2 * matrix(KV_HEADS * DIM, WIDTH),
            f"blk.{i}.attn_v": matrix(KV_HEADS * DIM, WIDTH),
            f"blk.{i}.attn_output": matrix(WIDTH, HEADS * DIM),
            f"blk.{i}.ffn_norm": norm(),
            f"blk.{i}.ffn_gate": matrix(INNER, WIDTH),
            f"blk.{i}.ffn_up": matrix(INNER, WIDTH),
            f"blk.{i}.ffn_down": matrix(WIDTH, INNER),
        }
    return weights


def interleaved(matrix: np.ndarray, dim: int = DIM) -> np.ndarray:
    """Row order of Q and K in a file: the two halves of each head alternate."""
    heads = matrix.reshape(-1, 2, dim // 2, matrix.shape[1])
    return heads.swapaxes(1, 2).reshape(matrix.shape)


def write_llama(path: Path, weights: dict[str, np.ndarray], **changes) -> Path:
    tensors = {}
    for name, weight in weights.items():
        permuted = name.endswith(("attn_q", "attn_k"))
        tensors[f"{name}.weight"] = f32(interleaved(weight) if permuted else weight)
    path.write_bytes(gguf_bytes(llama_metadata(**changes), tensors))
    return path
