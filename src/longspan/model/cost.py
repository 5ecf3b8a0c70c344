"""What a decoder costs, part by part, as functions of its config: parameters, FLOPs, bytes kept for the backward.

FLOPs are those of the matrix products, a multiply-add counted as two; norms, rotations and activations are left out, as
is usual. Attention counts the (query, key) pairs that the mask *allows*: 4·area·h·d forward, and 10·area·h·d backward,
which computes the scores again; a row of s tokens has s·(s+1)/2 pairs under a causal mask. Torch's own flop counter and
figures published as dense do not look at the mask: pass s·s to compare.

Bytes are those of the tensors that autograd keeps between forward and backward, each storage once, without parameters
and inputs. They are this code's, not a lower bound: a change in a part changes its line here, and a test measures both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longspan.mixers.flops import attend_flops, num_parameters, projection_flops
from longspan.model.config import DecoderConfig, LearnedPositionsConfig
from longspan.model.recompute import Recompute, check_recompute


def parameters(config: DecoderConfig) -> dict[str, int]:
    """Number of parameters of each part; their sum is the model's. A tied head has none of its own."""
    dim, mlp = config.hidden_size, config.mlp
    num_inner = 2 if mlp.gated else 1
    learned = config.positions.max_positions if isinstance(config.positions, LearnedPositionsConfig) else 0
    return {
        "embedding": (config.vocab_size + learned) * dim,
        "attention": config.num_layers * num_parameters(config.attention, dim),
        "mlp": config.num_layers
        * (dim * mlp.inner_size * (num_inner + 1) + mlp.bias * (num_inner * mlp.inner_size + dim)),
        "norm": dim * (2 if config.norm.kind == "layer" else 1) * (config.num_layers * _norms_a_block(config) + 1),
        "head": 0 if config.tie_embeddings else config.vocab_size * dim,
    }


def flops(
    config: DecoderConfig,
    num_tokens: int,
    mask_area: int | Sequence[int],
    *,
    backward: bool,
    recompute: Recompute = "none",
) -> dict[str, int]:
    """FLOPs of each part, forward, or forward and backward together.

    Args:
        num_tokens: over all rows of the batch.
        mask_area: allowed (query, key) pairs over all rows of the batch: one number for all layers, or one for each
            where windows differ.
        backward: count the backward too.
        recompute: what the backward runs again. Not a block's last linear, unless a norm follows: nothing needs its
            output, and torch stops there.

    Raises:
        ValueError: negative counts, areas that do not match the layers, or a recompute that is not known.
    """
    check_recompute(recompute)
    areas = [mask_area] * config.num_layers if isinstance(mask_area, int) else list(mask_area)
    if len(areas) != config.num_layers:
        raise ValueError(
            f"mask_area must be one number or one for each of the {config.num_layers} layers, got {len(areas)}; "
            "give the area under each layer's window"
        )
    if num_tokens < 0 or min(areas) < 0:
        raise ValueError(f"tokens and areas must not be negative, got {num_tokens} and {min(areas)}; count them again")
    dim = config.hidden_size
    down = 2 * num_tokens * dim * config.mlp.inner_size * config.num_layers
    forward = {
        "projections": config.num_layers * projection_flops(config.attention, dim, num_tokens),
        "attention": attend_flops(config.attention, sum(areas)),
        "mlp": down * (3 if config.mlp.gated else 2),
        "head": 2 * num_tokens * dim * config.vocab_size,
    }
    if not backward:
        return forward
    total = {part: 3 * value for part, value in forward.items()}
    total["attention"] = forward["attention"] * 7 // 2
    if recompute != "none":
        total["projections"] += forward["projections"]
        total["mlp"] += forward["mlp"] - (down if config.wiring in ("sequential", "parallel") else 0)
    if recompute == "full":
        total["attention"] += forward["attention"]
    return total


def activation_bytes(
    config: DecoderConfig, batch: int, local_tokens: int, dtype: torch.dtype, recompute: Recompute
) -> dict[str, int]:
    """Bytes that `DecoderLM.loss` keeps for its backward, for each part; their sum is what a rank holds after the
    forward.

    Counted for fused attention, which keeps q, k, v, its output and lse; a window or softcap in `LocalContext` keeps l²
    values more, and an mlp run in tiles keeps nothing of its own. While a block is computed again, its "none" bytes
    come on top: `block_bytes`.

    Args:
        batch: rows, b.
        local_tokens: tokens of each row on this rank, l.
        dtype: of parameters and activations.
        recompute: what is computed again in the backward.

    Returns:
        "norm", "attention" and "mlp" of all blocks; "checkpoint", the inputs of recomputed blocks; "loss", the last
        norm and the gradients that the chunked loss has formed.

    Raises:
        ValueError: counts that are not positive, or a recompute that is not known.
    """
    check_recompute(recompute)
    block = block_bytes(config, batch, local_tokens, dtype)
    num_states = batch * local_tokens * config.hidden_size
    wide = _wide(dtype)
    total = dict.fromkeys(("norm", "attention", "mlp", "checkpoint"), 0)
    if recompute == "none":
        total |= {part: config.num_layers * value for part, value in block.items()}
    else:
        total["checkpoint"] = config.num_layers * num_states * dtype.itemsize
    if recompute == "attention":
        total["attention"] = config.num_layers * _attended_bytes(config, batch, local_tokens, dtype)
    # The states after the last norm are not kept, but their gradient is, in the same size.
    loss = _norm_bytes(config, batch * local_tokens, dtype) + config.vocab_size * config.hidden_size * wide
    return total | {"loss": loss}


def peak_bytes(
    config: DecoderConfig,
    batch: int,
    local_tokens: int,
    dtype: torch.dtype,
    recompute: Recompute,
    *,
    chunk_tokens: int = 1024,
    device_type: str = "cuda",
) -> int:
    """The most bytes alive in a forward of `DecoderLM.loss` and its backward, gradients included, parameters left out.

    The largest of three moments: the loss, when all that is kept is there and a chunk of logits besides; the backward
    of the first or last block, in its mlp or its norm, when the (recomputed) block and the gradients of the blocks
    above are there; the end, when all gradients are. Not counted: work space inside kernels, and an mlp run in tiles.

    Args:
        batch, local_tokens, dtype, recompute: as for `activation_bytes`.
        chunk_tokens: rows of logits that the loss holds at a time.
        device_type: a CPU holds fp32 copies of a half-precision head in the loss.

    Raises:
        ValueError: as `activation_bytes`, or chunk_tokens below 1.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}; 1024 is the default")
    kept = activation_bytes(config, batch, local_tokens, dtype, recompute)
    num_tokens, wide, item = batch * local_tokens, _wide(dtype), dtype.itemsize
    states = num_tokens * config.hidden_size * item
    head, chunk = config.vocab_size * config.hidden_size, min(chunk_tokens, num_tokens)

    # A softcap's slope is as large as the logits.
    logits = chunk * config.vocab_size * wide * (1 if config.final_softcap is None else 2)
    loss = sum(kept.values()) + states + logits + head * wide
    if item != wide:
        raised = (head + chunk * config.hidden_size) * wide
        loss += raised if device_type == "cpu" else chunk * config.vocab_size * item

    count, mlp = parameters(config), config.mlp
    norm_gradient = config.hidden_size * (2 if config.norm.kind == "layer" else 1) * item
    above = head * item + norm_gradient
    a_block = (sum(count[part] for part in ("attention", "mlp", "norm")) * item - norm_gradient) // config.num_layers
    # Gradients of the product, of its two factors where it is gated, less the product itself, which is done with.
    inner = num_tokens * mlp.inner_size * item * (2 if mlp.gated else 1)
    block = block_bytes(config, batch, local_tokens, dtype)
    in_mlp = inner + states + (mlp.inner_size + mlp.bias) * config.hidden_size * item
    # The norm runs in the wide dtype, once its mlp has let go of everything but its gradients.
    norm_states = 3 * states if item == wide else 2 * states + 4 * states // item * wide
    in_norm = norm_states + count["mlp"] // config.num_layers * item - block["mlp"]
    is_rms = config.norm.kind != "layer"
    working = sum(block.values()) + max(in_mlp, in_norm if is_rms else 0)
    if recompute != "none" and is_rms and item != wide:
        # The block's input is kept beside the wide copy of it that its norm keeps.
        working += states
    below = sum(kept[part] for part in ("norm", "attention", "mlp", "checkpoint")) // config.num_layers
    backward = above + working + (config.num_layers - 1) * max(below, a_block)

    # Where the head is tied, its gradient, the embedding's and their sum meet.
    end = sum(count.values()) * item + states + (2 * head * item if config.tie_embeddings else 0)
    return max(loss, backward, end)


def block_bytes(config: DecoderConfig, batch: int, local_tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that one block keeps for its backward when nothing is recomputed: "norm", "attention" and "mlp".

    Raises:
        ValueError: counts that are not positive.
    """
    if batch < 1 or local_tokens < 1:
        raise ValueError(
            f"batch and local_tokens must be positive, got {batch} and {local_tokens}; give what a rank holds"
        )
    num_tokens, attention, mlp = batch * local_tokens, config.attention, config.mlp
    wide = _wide(dtype)
    num_kv = num_tokens * attention.kv_heads * attention.head_dim
    num_q = num_tokens * attention.num_heads * attention.head_dim
    rotates = not isinstance(config.positions, LearnedPositionsConfig)

    attended = (num_q + 2 * num_kv) * dtype.itemsize + _attended_bytes(config, batch, local_tokens, dtype)
    if attention.qk_norm_eps is not None:
        # Each norm keeps its wide input, a factor a head, and its output before the weight, wide for 1 + weight.
        attended += (num_q + num_kv) * wide + num_tokens * (attention.num_heads + attention.kv_heads) * wide
        # Unrotated, q and k are the norms' own outputs; rotated, those are dropped.
        plus_one = attention.qk_norm_kind == "rms_plus_one"
        attended += (num_q + num_kv) * (wide if plus_one else dtype.itemsize)
        attended += 2 * attention.head_dim * wide if plus_one else 0
    if rotates:
        attended += local_tokens * attention.head_dim * wide
    # A gated one keeps gate, its activation, up and their product; gelu its input and output.
    num_inner = 4 if mlp.gated else 2
    norm = _norms_a_block(config) * _norm_bytes(config, num_tokens, dtype)
    if config.wiring == "sandwich":
        # What the two outer norms give is added to the residual stream, which keeps nothing.
        norm -= 2 * num_tokens * config.hidden_size * dtype.itemsize
    return {
        "norm": norm,
        "attention": attended,
        "mlp": num_inner * num_tokens * mlp.inner_size * dtype.itemsize,
    }


def _attended_bytes(config: DecoderConfig, batch: int, local_tokens: int, dtype: torch.dtype) -> int:
    """Output and lse of one layer's attention."""
    num_rows = batch * local_tokens * config.attention.num_heads
    return num_rows * (config.attention.head_dim * dtype.itemsize + _wide(dtype))


def _norm_bytes(config: DecoderConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """What a norm over the width keeps, and its output, which the linears after it keep."""
    num_states, wide = num_tokens * config.hidden_size, _wide(dtype)
    if config.norm.kind == "layer":
        # Mean and rstd are wide on a GPU; a CPU keeps them in the dtype of the input.
        return 2 * num_states * dtype.itemsize + 2 * num_tokens * wide
    # RMS: the wide input, a factor a token, the output before the weight, the output.
    kept = num_states * (wide + 2 * dtype.itemsize) + num_tokens * wide
    if config.norm.kind == "rms_plus_one":
        # The output before the weight is wide, and so is 1 + weight.
        kept += num_states * (wide - dtype.itemsize) + config.hidden_size * wide
    return kept


def _norms_a_block(config: DecoderConfig) -> int:
    return {"sequential": 2, "parallel": 1, "sandwich": 4, "post": 2}[config.wiring]


def _wide(dtype: torch.dtype) -> int:
    return torch.promote_types(dtype, torch.float32).itemsize
