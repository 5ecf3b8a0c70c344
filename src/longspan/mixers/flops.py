"""FLOPs of the mixers, forward, a multiply-add counted as two; norms, rotations and softmax itself are left out, as is
usual.

The backward of a matrix product takes twice its forward; that of attention 2.5 times (its scores are computed again).
"""

from __future__ import annotations

from longspan.mixers.config import AttentionConfig


def projection_flops(config: AttentionConfig, hidden_size: int, num_tokens: int) -> int:
    """FLOPs of the q, k, v and output projections of one layer for `num_tokens` tokens."""
    return 4 * num_tokens * hidden_size * (config.num_heads + config.kv_heads) * config.head_dim


def attend_flops(config: AttentionConfig, num_pairs: int) -> int:
    """FLOPs of q·kᵀ and p·v of one layer over `num_pairs` allowed (query, key) pairs (`Mask.area` times the batch)."""
    return 4 * config.num_heads * config.head_dim * num_pairs


def num_parameters(config: AttentionConfig, hidden_size: int) -> int:
    """Weights and biases of one attention layer."""
    q, kv = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    biases = (q + 2 * kv) * config.qkv_bias + hidden_size * config.out_bias
    return 2 * hidden_size * (q + kv) + biases + (2 * config.head_dim if config.qk_norm_eps is not None else 0)
