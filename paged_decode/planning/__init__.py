"""How many pages, rows and tokens fit a memory, and the least time of a step. Host only, no jax.

```
read_model("config.json")      ModelShape: Hk, D and window of every layer
  or ModelShape.of_sizes(...)      |
                               plan_layout(model, cache_bytes=, rows=, context=)
                                   |
                               Plan: the CacheLayout for KVCache.create and BlockAllocator
                                   |
                               decode_step(plan, weights_bytes=, bandwidth_bytes=): its roofline
```
"""

from .files import read_model
from .gguf import model_of_gguf, read_metadata
from .hf import model_of_config
from .layouts import Plan, plan_layout
from .roofline import CARDS, Card, DecodeStep, decode_step
from .shapes import LayerShape, ModelShape

__all__ = [
    "CARDS",
    "Card",
    "DecodeStep",
    "LayerShape",
    "ModelShape",
    "Plan",
    "decode_step",
    "model_of_config",
    "model_of_gguf",
    "plan_layout",
    "read_metadata",
    "read_model",
]
