"""Attention over a paged KV cache, one folder per kernel. Imports nothing of jaxserve.

The cache is one array, `pool[L, P, page, 2·K·H]`: layer, page, position in the page, then for each key/value
head its key and its value. Letters: B rows, T packed query tokens, R packed sequences, N query heads,
K key/value heads, H head size, S cached positions of one block.
"""

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import prefill_attention

__all__ = ["decode_attention", "prefill_attention"]
