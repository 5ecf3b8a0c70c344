"""Cross-entropy of a long sequence without ever holding its logits.

The fp32 logits of s tokens over a vocabulary of V take 4·s·V bytes and their gradient as much again: for 131,072
tokens and 128,256 words, 63 GiB each. Here the head runs on `chunk_tokens` rows at a time, and the gradients of states
and head are formed in the same pass, while the probabilities of the chunk are still there; backward only scales them.

With z = W·h, loss = Σ_rows log Σ_v exp z_v - z_label, so dz = softmax(z) - onehot(label), dh = dz·W, dW = dzᵀ·h. With a
softcap c the logits are c·tanh(z/c) and dz gains the factor 1 - (logit/c)².

Cost for n tokens: 2·n·V·dim FLOPs forward, 6·n·V·dim when gradients are wanted (nothing is computed twice). Memory: one
chunk of logits (two with a softcap) and the gradients themselves, dW in fp32 and dh in the dtype of h. On a CPU, half
precision adds one fp32 copy of W, because there a product of half-precision matrices cannot be had in fp32.

Loss parallelism (Megatron-LM, arXiv:1909.08053, section 3): with `words`, each rank of a group has a run of the head's
rows and logits; a chunk costs two all-reduces, of one and of two numbers for each token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

IGNORED = -100


def readable(x: Tensor) -> bool:
    """Whether a check may look at values: for a GPU's it would have to wait, and a traced or fake tensor has none."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def default_chunk(hidden_size: int) -> int:
    """Tokens whose logits exist at one time: such that these take no more than the head's gradient, which every chunk
    reads and writes once."""
    return max(1024, hidden_size)


class Words(NamedTuple):
    """The run of the vocabulary whose rows of the head this rank holds, the others of `group` holding the rest."""

    start: int
    total: int
    group: dist.ProcessGroup | None


def chunked_cross_entropy(
    hidden: Float[Tensor, "b l dim"],
    weight: Float[Tensor, "vocab dim"],
    labels: Int64[Tensor, "b l"],
    *,
    chunk_tokens: int = 1024,
    softcap: float | None = None,
    words: Words | None = None,
    bias: Float[Tensor, " vocab"] | None = None,
) -> tuple[Float[Tensor, ""], Int64[Tensor, ""]]:
    """Summed cross-entropy of the logits `hidden · weightᵀ` against `labels`, and the number of labels counted.

    Args:
        hidden: states after the final norm.
        weight: the head; it may need no gradient.
        labels: the token to predict at each position; -100 = no label there.
        chunk_tokens: rows whose logits exist at one time; the memory of the call is 4·chunk_tokens·vocab bytes.
        softcap: logits become softcap·tanh(logits / softcap).
        words: the part of the vocabulary that `weight` and `bias` hold; None: all. All ranks of its group have the same
            `hidden` and `labels`, and call together; the gradient of `hidden` is then this rank's addend of it.
        bias: added to the logits, before the softcap.

    Returns:
        The sum (not the mean) of the losses in nats, fp32 (fp64 for fp64 inputs), and the number of labels counted.

    Raises:
        ValueError: shapes that do not fit, labels that are not int64 or lie outside the vocabulary (checked on a CPU;
            on a GPU the gather's own assertion stops the run), or an option out of its range.
        RuntimeError: backward with create_graph=True, since the gradients here are constants to autograd.
    """
    _check(hidden, weight, labels, chunk_tokens, softcap, weight.shape[0] if words is None else words.total)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have one value for each of the {weight.shape[0]} rows of weight, got {tuple(bias.shape)}; "
            "pass the head's own"
        )
    want_grads = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, chunk_tokens, softcap, words, want_grads)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, chunk_tokens, softcap, words, want_grads):
        # needs_input_grad stays true under no_grad, hence the extra flag from outside.
        want_hidden = want_grads and ctx.needs_input_grad[0]
        want_weight = want_grads and ctx.needs_input_grad[1]
        want_bias = want_grads and ctx.needs_input_grad[2]
        want_any = want_hidden or want_weight or want_bias
        accumulate = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        product = _Product(hidden, weight, accumulate)

        rows = hidden.reshape(-1, hidden.shape[-1])
        targets = labels.reshape(-1)
        sum_loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        dhidden = torch.empty_like(rows) if want_hidden else None
        make = torch.empty if len(rows) else torch.zeros  # the first chunk fills it
        dweight = make(weight.shape, dtype=accumulate, device=weight.device) if want_weight else None
        dbias = torch.zeros(bias.shape, dtype=accumulate, device=bias.device) if want_bias else None

        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, rows.shape[0], chunk_tokens):
                chunk = product.prepare(rows[start : start + chunk_tokens])
                logits, target = product.mm(chunk, product.weight.t()), targets[start : start + chunk_tokens]
                if bias is not None:
                    logits += bias
                if product.native and words is None:
                    losses, dlogits = _chunk_cuda(logits, target, softcap, want_any, product.operand)
                else:
                    losses, dlogits = _chunk(logits, target[:, None], softcap, words, want_any)
                sum_loss += losses.sum()
                if dlogits is None:
                    continue
                if dbias is not None:
                    dbias += dlogits.sum(0, dtype=accumulate)
                dlogits = product.prepare(dlogits)
                if dhidden is not None:
                    dhidden[start : start + chunk_tokens] = product.mm(dlogits, product.weight)
                if dweight is not None:
                    product.add(dweight, dlogits.t(), chunk, first=not start)

        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.shape, ctx.weight_dtype = hidden.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        num_tokens = (labels != IGNORED).sum()
        ctx.mark_non_differentiable(num_tokens)
        return sum_loss, num_tokens

    @staticmethod
    def backward(ctx, *grads):
        # Without this a second derivative would silently be zero: grad mode is on here only under create_graph=True.
        if torch.is_grad_enabled():
            raise RuntimeError("chunked_cross_entropy has no second derivative; drop create_graph=True")
        grad, dhidden, dweight, dbias = grads[0], *ctx.saved_tensors
        # Not in place: the graph may be kept and walked again.
        if dhidden is not None:
            dhidden = (dhidden * grad).to(dhidden.dtype).reshape(ctx.shape)
        if dweight is not None:
            dweight = _scaled(dweight, grad, ctx.weight_dtype)
        if dbias is not None:
            dbias = (dbias * grad).to(ctx.bias_dtype)
        return dhidden, dweight, dbias, None, None, None, None, None


def _scaled(wide: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded as it is written: the head's gradient is large."""
    if wide.is_cuda and wide.dtype == torch.float32 != dtype:
        from longspan.model.loss_cuda import scaled

        return scaled(wide, factor, dtype)
    return torch.mul(wide, factor, out=torch.empty_like(wide, dtype=dtype))


class _Product:
    """Matrix products whose result is in the accumulation dtype, whatever the operands' dtype."""

    def __init__(self, hidden: Tensor, weight: Tensor, accumulate: torch.dtype) -> None:
        # cuBLAS multiplies half-precision operands into fp32; elsewhere the operands themselves are raised.
        self.native = hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype != accumulate
        self.operand = hidden.dtype if self.native else accumulate
        self.accumulate = accumulate
        self.weight = weight.to(self.operand)

    def prepare(self, x: Tensor) -> Tensor:
        return x.to(self.operand)

    def mm(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.mm(x, y, out_dtype=self.accumulate) if self.native else torch.mm(x, y)

    def add(self, total: Tensor, x: Tensor, y: Tensor, *, first: bool) -> None:
        """Adds x·y to `total`, without another matrix of its size; `first`: it becomes x·y, whatever it was."""
        beta = 0 if first else 1
        if self.native:
            torch.addmm(total, x, y, out_dtype=self.accumulate, beta=beta, out=total)
        else:
            torch.addmm(total, x, y, beta=beta, out=total)


def _chunk_cuda(
    logits: Tensor, target: Tensor, softcap: float | None, want_grad: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """As `_chunk`, by one kernel, the gradient in the dtype of the products."""
    from longspan.model.loss_cuda import row_losses

    dlogits = torch.empty_like(logits, dtype=dtype) if want_grad else None
    return row_losses(logits, target, softcap, dlogits), dlogits


def _chunk(
    logits: Tensor, target: Tensor, softcap: float | None, words: Words | None, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss per row, and the gradient of the summed loss by the logits before the softcap. Overwrites `logits`."""
    slope = None
    if softcap is not None:
        squashed = logits.div_(softcap).tanh_()
        slope = 1 - squashed.square() if want_grad else None
        logits = squashed.mul_(softcap)
    ignored = target == IGNORED
    absent = ignored  # labels without a column here
    if words is not None:
        target = target - words.start
        absent = ignored | (target < 0) | (target >= logits.shape[1])
    index = target.masked_fill(absent, 0)
    picked = logits.gather(1, index).masked_fill_(absent, 0)
    largest = logits.amax(1, keepdim=True)
    if words is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=words.group)
    probabilities = logits.sub_(largest).exp_()
    total = probabilities.sum(1, keepdim=True)
    if words is not None:
        both = torch.cat([total, picked], 1)
        dist.all_reduce(both, group=words.group)
        total, picked = both[:, :1], both[:, 1:]
    losses = (total.log() + largest - picked).masked_fill_(ignored, 0)
    if not want_grad:
        return losses, None
    dlogits = probabilities.div_(total)
    dlogits.scatter_add_(1, index, absent.to(dlogits.dtype).sub_(1))
    if slope is not None:
        dlogits.mul_(slope)
    return losses, dlogits.masked_fill_(ignored, 0)


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, softcap: float | None, vocab_size: int
) -> None:
    if hidden.ndim != 3 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden must be (b, l, dim) and weight (vocab, dim) with one dim, got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}; pass the states after the final norm and the head's weight"
        )
    if labels.shape != hidden.shape[:2] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape {tuple(hidden.shape[:2])}, got {labels.dtype} of {tuple(labels.shape)}; "
            f"use one label per token, {IGNORED} for none"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}; 1024 is the default")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; use None for no cap")
    if readable(labels):
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise ValueError(
                f"labels must lie in 0..{vocab_size - 1} or be {IGNORED}, got {wrong[0].item()}; "
                "is the tokenizer's vocabulary larger than the model's?"
            )
