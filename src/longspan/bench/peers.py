"""What the benchmark of training steps sets beside ours: Hugging Face transformers, and torchtitan's Llama.

Both start from the weights of one checkpoint folder, take the same batch at every step, and do what a step of ours
does: forward, backward, the gradient's norm and its clipping, AdamW with weight decay on matrices alone, at the
config's own rate throughout. Neither is a dependency: where it cannot be imported, `NotInstalledError` says why.

torchtitan is 0.3.0, with the parts that its `Trainer` puts together and in its order: the model with fused qkv, its
activation checkpointing, `torch.compile` of each block and of the loss, FSDP2 with bf16 parameters over fp32 shards
(on one rank too), the loss in 8 chunks of the sequence, its clipping, its fused optimizer. The Trainer itself wants
packages for data sets and logs. Left out of it: the CUDA graph around forward and backward, and its default back end
for meshes, for which torch 2.11 is too old ("partial_dtensor" is its older one; one rank computes the same). With a
torch that old three things are mended here, where it says so.

Each peer is for a process of its own: torchtitan changes settings of torch's compiler for the whole process.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn

from longspan.mixers.config import RotaryConfig, require
from longspan.model.config import DecoderConfig
from longspan.model.hf_export import write_llama
from longspan.train.config import OptimConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Somebody else's training step.

    Args:
        version: of the package that ran.
        notes: what differs from our step.
        parameters: how many are trained.
        step: one optimiser step on the batch; the loss per label, before the update.
    """

    name: str
    version: str
    notes: tuple[str, ...]
    parameters: int
    step: Callable[[], float]


class NotInstalledError(RuntimeError):
    """The peer's package, or one that it needs, cannot be imported here."""


@contextlib.contextmanager
def _importing(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise NotInstalledError(f"{name} is not installed, or not for torch {torch.__version__}: {error}") from error


def hugging_face(
    config: DecoderConfig,
    weights: Path,
    tokens: Tensor,
    *,
    compiled: bool,
    recompute: bool,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    optim: OptimConfig | None = None,
) -> Peer:
    """LlamaForCausalLM with torch's attention; parameters, gradients and AdamW's moments in `dtype`.

    Args:
        weights: a checkpoint folder of `config`.
        tokens: (1, l + 1) int64, inputs and the labels behind them.
        compiled: torch.compile of the whole model, its loss included.
        recompute: gradient checkpointing of every layer.

    Raises:
        ValueError: a config that is not Llama's, tokens of another shape.
        NotInstalledError: without transformers.
    """
    optim = optim or OptimConfig()
    _check(config, tokens)
    with _importing("transformers"):
        from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(
        weights, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    model.to(device).train()
    if recompute:
        with warnings.catch_warnings():  # later releases have another name for the same
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    inputs, labels = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
    run = torch.compile(model) if compiled else model

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        # As they are, `labels` would be shifted by one more.
        loss = run(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        if optim.clip > 0:
            nn.utils.clip_grad_norm_(parameters, optim.clip)
        optimizer.step()
        return loss.item()

    notes = ("all logits at once, in fp32",)
    if dtype != torch.float32:
        notes = (f"parameters, gradients and moments in {_name(dtype)}, none in fp32", *notes)
    return Peer(
        name="transformers",
        version=version("transformers"),
        notes=notes,
        parameters=sum(p.numel() for p in parameters),
        step=step,
    )


def torchtitan(
    config: DecoderConfig,
    weights: Path,
    tokens: Tensor,
    *,
    compiled: bool,
    recompute: bool,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    optim: OptimConfig | None = None,
    saved: Literal["products", "nothing"] = "products",
    attention: Literal["sdpa", "flex"] = "sdpa",
) -> Peer:
    """torchtitan's Llama-3 under FSDP2 on one rank; parameters and moments in fp32, computation in `dtype`.

    Starts a process group of one rank where there is none.

    Args:
        weights: a checkpoint folder of `config`.
        tokens: (1, l + 1) int64, inputs and the labels behind them; l a multiple of 8, the chunks of its loss.
        compiled: torch.compile of every block and of the loss.
        recompute: its activation checkpointing of every block.
        saved: what that keeps: its default, "products", attention's output and every second matrix product.
        attention: "sdpa": torch's fused kernels, cuDNN's first; "flex": its own default, with a mask of documents.

    Raises:
        ValueError: a config that is not Llama's, or with scaled rotary positions; tokens of another shape.
        NotInstalledError: without torchtitan or what it needs.
    """
    optim = optim or OptimConfig()
    length = _check(config, tokens)
    require(length % 8 == 0, "torchtitan's loss needs a length that 8 divides", length, "cut it")
    require(dtype in _TITAN_DTYPES, "torchtitan computes in bfloat16 or float32", dtype, "pick one of these")
    with _importing("torchtitan"):
        titan = _Titan()

    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    require(dist.get_world_size() == 1, "a peer runs on one rank", dist.get_world_size(), "start one process")
    model_config = titan.model_config(config, length, attention)
    compilation = titan.CompileConfig(enable=compiled)
    model = titan.sharded(model_config, compilation, _TITAN_DTYPES[dtype], recompute, saved, device)
    _fill(model, titan.whole(model_config, weights), titan.canonical_fqn)
    loss_of = titan.loss(model, compilation)
    optimizers = titan.optimizers(model, optim)
    parameters = list(model.parameters())

    inputs, labels = tokens[:, :-1].to(device), tokens[:, 1:].contiguous().to(device)
    positions = torch.arange(length, device=device)[None]
    count = torch.tensor(length, device=device)

    def step() -> float:
        optimizers.zero_grad()
        more = {}
        if attention == "flex":
            more = {"positions": positions, "attention_masks": model.get_attention_masks(positions=positions)}
        hidden = model(inputs, **more)
        loss, _ = loss_of(hidden, labels, count)
        del hidden
        loss.backward()
        if optim.clip > 0:
            titan.clip_grad_norm_(parameters, optim.clip, foreach=True)
        optimizers.step()
        return loss.item()

    return Peer(
        name="torchtitan",
        version=version("torchtitan"),
        notes=("FSDP2 on one rank", "loss in 8 chunks", f"{attention} attention", "no CUDA graph", *_OLD_NOTES),
        parameters=sum(p.numel() for p in parameters),
        step=step,
    )


_OLD_TORCH = not hasattr(torch.distributed.fsdp, "DataParallelMeshDims")
_OLD_NOTES = ("the head's gradient reduced in every chunk, for an old torch",) if _OLD_TORCH else ()
_TITAN_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


class _Titan:
    """The parts of torchtitan, imported where they are asked for."""

    def __init__(self) -> None:
        if _OLD_TORCH:
            # A type of a later torch, imported by name and used by the two other back ends for meshes.
            vars(torch.distributed.fsdp)["DataParallelMeshDims"] = object
        from torchtitan.components.checkpointer.utils import canonical_fqn
        from torchtitan.config import CompileConfig
        from torchtitan.distributed import utils

        utils.set_spmd_backend("partial_dtensor")
        self.CompileConfig, self.canonical_fqn, self.clip_grad_norm_ = (
            CompileConfig,
            canonical_fqn,
            utils.clip_grad_norm_,
        )
        from torchtitan.models import llama3

        self.llama3 = llama3

    def model_config(self, config: DecoderConfig, length: int, attention: str) -> Any:
        """Its config of a Llama, whose initial values nobody draws: a checkpoint overwrites them."""
        from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
        from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
        from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
        from torchtitan.models.common.param_init import skip_param_init

        heads, positions, dim = config.attention, config.positions, config.hidden_size
        assert isinstance(positions, RotaryConfig)
        require(positions.scaling is None, "this peer has plain rotary positions", positions.scaling, "leave it out")
        skip = {"weight": skip_param_init}
        norm = partial(RMSNorm.Config, normalized_shape=dim, eps=config.norm.eps, param_init=skip)

        def block() -> Any:
            return self.llama3.Llama3TransformerBlock.Config(
                attention_norm=norm(),
                ffn_norm=norm(),
                attention=make_gqa_config(
                    dim=dim,
                    n_heads=heads.num_heads,
                    n_kv_heads=heads.kv_heads,
                    head_dim=heads.head_dim,
                    wqkv_param_init=skip,
                    wo_param_init=skip,
                    inner_attention=(ScaledDotProductAttention if attention == "sdpa" else FlexAttention).Config(),
                    fuse_qkv=True,
                    rope=ComplexRoPE.Config(dim=heads.head_dim, max_seq_len=length, theta=positions.theta),
                ),
                feed_forward=make_ffn_config(
                    dim=dim, hidden_dim=config.mlp.inner_size, w1_param_init=skip, w2w3_param_init=skip
                ),
            )

        return self.llama3.Llama3Model.Config(
            dim=dim,
            vocab_size=config.vocab_size,
            enable_weight_tying=config.tie_embeddings,
            tok_embeddings=Embedding.Config(num_embeddings=config.vocab_size, embedding_dim=dim, param_init=skip),
            norm=norm(),
            lm_head=Linear.Config(in_features=dim, out_features=config.vocab_size, param_init=skip),
            layers=[block() for _ in range(config.num_layers)],
        )

    def whole(self, model_config: Any, weights: Path) -> nn.Module:
        """The model on the host, in fp32, filled from a checkpoint folder through its own adapter."""
        from safetensors.torch import load_file

        stored = {name: t for file in sorted(weights.glob("*.safetensors")) for name, t in load_file(file).items()}
        model = model_config.build()
        model.load_state_dict(self.llama3.Llama3StateDictAdapter(model_config, None).from_hf(stored))
        return model

    def sharded(
        self, model_config: Any, compilation: Any, dtype: str, recompute: bool, saved: str, device: torch.device
    ) -> Any:
        """The model as its trainer makes it, parameters not yet filled."""
        from torchtitan.config import ParallelismConfig, TrainingConfig
        from torchtitan.distributed import parallel_dims
        from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

        parallel_dims.device_type = device.type  # without a GPU it takes one for granted all the same
        parallelism = ParallelismConfig(spmd_backend="partial_dtensor")
        kept = (SelectiveAC if saved == "products" else FullAC).Config() if recompute else None
        with torch.device("meta"):
            model = model_config.build()
        model = self.llama3.parallelize_llama(
            model,
            parallel_dims=parallel_dims.ParallelDims.from_config(parallelism, 1),
            training=TrainingConfig(mixed_precision_param=dtype),
            parallelism=parallelism,
            compile_config=compilation,
            ac_config=kept,
            dump_folder="",
        )
        model.to_empty(device=device)
        with torch.no_grad():
            model.init_weights(buffer_device=None)
        return model.train()

    def loss(self, model: Any, compilation: Any) -> Any:
        """Head and cross-entropy in chunks, which the model then leaves to it."""
        from torchtitan.components.loss import ChunkedLossWrapper

        found = ChunkedLossWrapper.Config().build(compile_config=compilation)
        if _OLD_TORCH:
            # It frees the head's weight after the last chunk, and with it the final norm's, which is of the same group
            # and yet to be differentiated: only a later torch gathers that again. What FSDP frees itself it still does.
            model.lm_head.reshard = lambda: None
            # It adds up the head's gradient in fp32 over the chunks, and such a torch reduces a group of one dtype
            # alone: here every chunk's is reduced.
            model.lm_head.set_requires_gradient_sync = lambda *_, **__: None
        found.set_lm_head(model.lm_head)
        model._skip_lm_head = True
        return found

    def optimizers(self, model: Any, optim: OptimConfig) -> Any:
        """AdamW, fused, with weight decay on matrices alone."""
        from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

        def group(pattern: str, decay: float) -> Any:
            values = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps, "weight_decay": decay}
            return ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=values)

        groups = [group(r"norm\.weight$", 0.0), group(".*", optim.weight_decay)]
        return OptimizersContainer.Config(param_groups=groups).build(model_parts=[model])


def _fill(model: nn.Module, whole: nn.Module, plain: Callable[[str], str]) -> None:
    """Copies every parameter of `whole` into the only shard of it."""
    given = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local: Any = parameter
            local.to_local().copy_(given.pop(plain(name)))
    assert not given, f"not filled: {sorted(given)}"


def _check(config: DecoderConfig, tokens: Tensor) -> int:
    """The length of the batch, where the peers can take it and the model."""
    write_llama(config)
    biased = config.attention.qkv_bias or config.mlp.bias
    require(not biased, "the peers compute projections without biases", biased, "leave them out")
    fits = tokens.ndim == 2 and tokens.shape[0] == 1 and tokens.shape[1] > 1 and tokens.dtype == torch.int64
    require(fits, "tokens must be (1, l + 1) int64", (tuple(tokens.shape), tokens.dtype), "give one row")
    return tokens.shape[1] - 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
