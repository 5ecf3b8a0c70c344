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
from longspan.model.loss import default_chunk
from longspan.model.offload import NUM_ON_DEVICE
from longspan.model.recompute import Recompute, check_recompute


def parameters(config: DecoderConfig) -> dict[str, int]:
    """Number of parameters of each part; their sum is the model's. A tied head has none of its own; "mlp" has routers
    and all experts."""
    dim = config.hidden_size
    learned = config.positions.max_positions if isinstance(config.positions, LearnedPositionsConfig) else 0
    return {
        "embedding": (config.vocab_size + learned) * dim,
        "attention": config.num_layers * num_parameters(config.attention, dim),
        "mlp": sum(_mixer_parameters(config, layer in config.sparse_layers) for layer in range(config.num_layers)),
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
    """FLOPs of each part, forward, or forward and backward together; of a mixture, of the experts that tokens go to.

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
    dense = config.num_layers - len(config.sparse_layers)
    down = 2 * num_tokens * dim * config.mlp.inner_size
    forward = {
        "projections": config.num_layers * projection_flops(config.attention, dim, num_tokens),
        "attention": attend_flops(config.attention, sum(areas)),
        "mlp": dense * down * (3 if config.mlp.gated else 2) + _moe_flops(config, num_tokens),
        "head": 2 * num_tokens * dim * config.vocab_size,
    }
    if not backward:
        return forward
    total = {part: 3 * value for part, value in forward.items()}
    total["attention"] = forward["attention"] * 7 // 2
    if recompute != "none":
        total["projections"] += forward["projections"]
        total["mlp"] += forward["mlp"]
        if config.wiring in ("sequential", "parallel"):
            # Of a mixture the last product is the weighted sum of the experts' rows.
            weighted = 0 if config.moe is None else 2 * num_tokens * config.moe.experts_per_token * dim
            total["mlp"] -= dense * down + len(config.sparse_layers) * weighted
    if recompute == "full":
        total["attention"] += forward["attention"]
    return total


def _mixer_parameters(config: DecoderConfig, sparse: bool) -> int:
    dim, mlp, moe = config.hidden_size, config.mlp, config.moe
    if sparse and moe is not None:
        experts = 3 * dim * (moe.num_experts * moe.inner_size + moe.shared_inner_size)
        return experts + dim * (moe.num_experts + moe.shared_gate)
    num_inner = 2 if mlp.gated else 1
    return dim * mlp.inner_size * (num_inner + 1) + mlp.bias * (num_inner * mlp.inner_size + dim)


def _moe_flops(config: DecoderConfig, num_tokens: int) -> int:
    """Of all sparse layers: router, experts, their weighted sum, shared expert. Without a capacity."""
    moe = config.moe
    if moe is None:
        return 0
    inner = moe.experts_per_token * moe.inner_size + moe.shared_inner_size
    lines = moe.num_experts + moe.shared_gate + 3 * inner + moe.experts_per_token
    return len(config.sparse_layers) * 2 * num_tokens * config.hidden_size * lines


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
    num_states = batch * local_tokens * config.hidden_size
    wide = _wide(dtype)
    total: dict[str, int] = dict.fromkeys(("norm", "attention", "mlp", "checkpoint"), 0)
    if recompute == "none":
        for layer in range(config.num_layers):
            sparse = layer in config.sparse_layers
            for part, value in block_bytes(config, batch, local_tokens, dtype, sparse=sparse).items():
                total[part] += value
    else:
        total["checkpoint"] = config.num_layers * num_states * dtype.itemsize
    if recompute == "attention":
        total["attention"] = config.num_layers * _attended_bytes(config, batch, local_tokens, dtype)
    # The states after the last norm are not kept, but their gradient is, in the same size.
    loss = _norm_bytes(config, batch * local_tokens, dtype) + config.vocab_size * config.hidden_size * wide
    if config.moe is not None and config.moe.balance in ("aux", "aux_pooled"):
        # Shares of tokens, which the auxiliary loss keeps.
        loss += config.moe.num_experts * wide * (len(config.sparse_layers) if config.moe.balance == "aux" else 1)
    return total | {"loss": loss}


def peak_bytes(
    config: DecoderConfig,
    batch: int,
    local_tokens: int,
    dtype: torch.dtype,
    recompute: Recompute,
    *,
    chunk_tokens: int | None = None,
    device_type: str = "cuda",
    moves: bool = False,
) -> int:
    """The most bytes alive in a forward of `DecoderLM.loss` and its backward, gradients included, parameters left out.

    The largest of three moments: the loss, when all that is kept is there and a chunk of logits besides; the backward
    of the first or last block, in its mlp or its norm, when the (recomputed) block and the gradients of the blocks
    above are there; the end, when all gradients are. Not counted: work space inside kernels, and an mlp run in tiles.

    Args:
        batch, local_tokens, dtype, recompute: as for `activation_bytes`.
        chunk_tokens: rows of logits that the loss holds at a time; None: as many as the decoder has it do.
        device_type: a CPU holds fp32 copies of a half-precision head in the loss.
        moves: what blocks keep goes to the host (`model.offload`); the bytes are the device's then.

    Raises:
        ValueError: as `activation_bytes` and `moved_bytes`, chunk_tokens below 1, or a mixture of experts, which is not
            counted yet.
    """
    if config.moe is not None:
        raise ValueError(
            f"the peak is counted for mlps alone, got {config.moe.num_experts} experts; take `activation_bytes` and "
            "the gradients of `parameters` for a lower bound"
        )
    chunk_tokens = default_chunk(config.hidden_size) if chunk_tokens is None else chunk_tokens
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}; None takes the decoder's own")
    kept = activation_bytes(config, batch, local_tokens, dtype, recompute)
    num_tokens, wide, item = batch * local_tokens, _wide(dtype), dtype.itemsize
    states = num_tokens * config.hidden_size * item
    head, chunk = config.vocab_size * config.hidden_size, min(chunk_tokens, num_tokens)

    there = sum(kept.values()) - (moved_bytes(config, batch, local_tokens, dtype, recompute) if moves else 0)
    # Torch's operators keep a softcap's slope, as large as the logits; the kernel for half precision on CUDA does not.
    slope = config.final_softcap is not None and (item == wide or device_type == "cpu")
    loss = there + states + chunk * (config.vocab_size * (1 + slope) + config.hidden_size) * wide
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
    # The gradients of a norm's output and input, or, where no kernel makes the latter, three wide tensors in its place.
    # By then the mlp has let go of everything but its gradients.
    has_kernel = config.norm.kind == "layer" or (device_type == "cuda" and config.norm.kind == "rms")
    norm_states = 2 * states if has_kernel else states + 3 * states // item * wide
    in_norm = norm_states + count["mlp"] // config.num_layers * item - block["mlp"]
    working = sum(block.values()) + max(in_mlp, in_norm)
    below = sum(kept[part] for part in ("norm", "attention", "mlp", "checkpoint")) // config.num_layers
    others = config.num_layers - 1
    beside = others * max(below, a_block)
    if moves and others:
        # What one other block keeps, there or on its way back, and the gradients of those that are done.
        beside = max((others - 1) * a_block + below, others * a_block)
    backward = above + working + beside

    # Where the head is tied, its gradient, the embedding's and their sum meet.
    end = sum(count.values()) * item + states + (2 * head * item if config.tie_embeddings else 0)
    # The gradients that the loss has formed, beside their multiples.
    scaled = there + states + head * item
    return max(loss, scaled, backward, end)


def moved_bytes(config: DecoderConfig, batch: int, local_tokens: int, dtype: torch.dtype, recompute: Recompute) -> int:
    """Bytes that `model.offload` takes to the host and back in a step: what recomputation keeps of all blocks but two.

    The host holds as many; the device has what is left of `activation_bytes`.

    Raises:
        ValueError: as `activation_bytes`, or recompute "none", with which nothing is moved.
    """
    if recompute == "none":
        raise ValueError('activations move with recompute "full" or "attention", got "none"; choose one of these')
    kept = activation_bytes(config, batch, local_tokens, dtype, recompute)
    a_block = (kept["checkpoint"] + kept["attention"]) // config.num_layers
    return max(0, config.num_layers - NUM_ON_DEVICE) * a_block


def streamed_bytes(
    config: DecoderConfig, dtype: torch.dtype, host_dtype: torch.dtype, *, num_buffers: int = 2
) -> dict[str, int]:
    """Bytes of a model whose layers are streamed (`model.layer_stream`), all of it trained by AdamW.

    Each parameter's start is aligned, which adds under 256 bytes apiece that are not counted here.

    Args:
        dtype: of parameters on the device.
        host_dtype: of the host's parameters, gradients and both AdamW moments.
        num_buffers: blocks on the device at a time.

    Returns:
        On the device: "blocks" (the buffers, and where dtypes differ the staging one), "outside" (embedding, last norm
        and head, which stay); `peak_bytes` comes on top, too high by the gradients of the blocks that have left. On the
        host: "parameters", "gradients", "optimizer".
    """
    count = parameters(config)
    last_norm = config.hidden_size * (2 if config.norm.kind == "layer" else 1)
    outside = count["embedding"] + count["head"] + last_norm
    a_block = (sum(count.values()) - outside) // config.num_layers
    staging = a_block * host_dtype.itemsize if host_dtype != dtype else 0
    at_home = sum(count.values()) * host_dtype.itemsize
    return {
        "blocks": min(num_buffers, config.num_layers) * a_block * dtype.itemsize + staging,
        "outside": outside * dtype.itemsize,
        "parameters": at_home,
        "gradients": at_home,
        "optimizer": 2 * at_home,
    }


def block_bytes(
    config: DecoderConfig, batch: int, local_tokens: int, dtype: torch.dtype, *, sparse: bool = False
) -> dict[str, int]:
    """Bytes that one block keeps for its backward when nothing is recomputed: "norm", "attention" and "mlp".

    `sparse`: a block with experts, not one with an mlp. The bytes are those without a capacity, which keeps fewer rows.

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
        # Each norm keeps its input, a factor a head, and 1 + weight where that is its factor.
        attended += (num_q + num_kv) * dtype.itemsize + num_tokens * (attention.num_heads + attention.kv_heads) * wide
        attended += 2 * attention.head_dim * wide if attention.qk_norm_kind == "rms_plus_one" else 0
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
        "mlp": _mixture_bytes(config, num_tokens, dtype)
        if sparse
        else num_inner * num_tokens * mlp.inner_size * dtype.itemsize,
    }


def _mixture_bytes(config: DecoderConfig, num_tokens: int, dtype: torch.dtype) -> int:
    moe, dim, wide, item = config.moe, config.hidden_size, _wide(dtype), dtype.itemsize
    assert moe is not None
    num_slots = num_tokens * moe.experts_per_token
    # The router: scores, ids of the chosen, and in half precision wide copies of the tokens and of its matrix.
    kept = num_tokens * moe.num_experts * wide + num_slots * 8
    if item != wide:
        kept += (num_tokens + moe.num_experts) * dim * wide
        if not moe.shared_inner_size and config.wiring != "parallel":
            kept -= num_tokens * dim * item  # the norm's output, which then nobody keeps
    if moe.renormalise:  # the chosen scores and their sums
        kept += (num_slots + num_tokens) * wide
    if moe.score == "sigmoid" and moe.balance in ("aux", "aux_pooled"):
        kept += num_tokens * wide
    # The order, weights, sorted rows, gate, its silu, up and their product, and the experts' outputs.
    kept += num_slots * (8 + item * (1 + dim + 4 * moe.inner_size + dim))
    kept += 4 * num_tokens * moe.shared_inner_size * item
    return kept + (num_tokens * (1 + dim) * item if moe.shared_gate else 0)


def _attended_bytes(config: DecoderConfig, batch: int, local_tokens: int, dtype: torch.dtype) -> int:
    """Output and lse of one layer's attention."""
    num_rows = batch * local_tokens * config.attention.num_heads
    return num_rows * (config.attention.head_dim * dtype.itemsize + _wide(dtype))


def _norm_bytes(config: DecoderConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """What a norm over the width keeps, and its output, which the linears after it keep."""
    wide = _wide(dtype)
    kept = 2 * num_tokens * config.hidden_size * dtype.itemsize
    # Mean and rstd of a layer norm are wide on a GPU; a CPU keeps them in the dtype of the input.
    kept += num_tokens * (2 if config.norm.kind == "layer" else 1) * wide
    return kept + (config.hidden_size * wide if config.norm.kind == "rms_plus_one" else 0)


def _norms_a_block(config: DecoderConfig) -> int:
    return {"sequential": 2, "parallel": 1, "sandwich": 4, "post": 2}[config.wiring]


def _wide(dtype: torch.dtype) -> int:
    return torch.promote_types(dtype, torch.float32).itemsize
