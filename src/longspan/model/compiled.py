"""Blocks through torch.compile, and what they keep for the backward when they may not keep all.

Under an activation memory budget the compiler picks what to compute again by FLOPs (a knapsack of matrix products;
element-wise operators come first). It knows none of ours and takes attention for free, so that its results are marked
here as kept always, as in LightSeq (arXiv:2310.03294, section 3.4).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

_MOST_GRAPHS = 64


def compile_blocks(blocks: Iterable[nn.Module], activation_budget: float = 1.0) -> None:
    """Compiles modules in place, for every shape anew; settings of the compiler are set for the whole process.

    Args:
        blocks: modules of one class that differ in their parameters alone share their code.
        activation_budget: share of what they would keep for the backward that they may; 1 for all.
    """
    # Blocks differ in the number of their layer, which no computation depends on: one graph for all of them.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # What attention keeps for its backward has a size that the mask decides.
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    # One graph for every shape, kind of block and handle of attention. At its limit of 8 torch goes on uncompiled.
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    functorch_config.activation_memory_budget = activation_budget
    inductor_config.joint_custom_post_pass = KeepAttention()
    for block in blocks:
        block.compile(dynamic=False)


class KeepAttention(CustomGraphPass):
    """Marks attention in a graph of forward and backward, before it is cut in two."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.target is torch.ops.longspan.attention.default:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> Any:
        """What compiled code in a cache depends on."""
        return get_hash_for_files((__file__,))
