"""Who stands where on the mesh, and who shares what with whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from longspan.layout.mesh import AXES, make_mesh
from tests.ranks import RankError, run_ranks


def one_rank(rank: int, world: int, sizes: dict[str, int], shard: bool, replicas: int) -> Any:
    mesh = make_mesh(**({"data": 1, "context": 1} | sizes), shard=shard, replicas=replicas, device_type="cpu")
    members = {name: dist.get_process_group_ranks(getattr(mesh, name).group) for name in (*AXES, "tokens")}
    places = {name: getattr(mesh, name).rank for name in AXES}
    ends = None if mesh.ends is None else dist.get_process_group_ranks(mesh.ends)
    return members, places, mesh.parameters.mesh.tolist(), mesh.expert_parameters.mesh.tolist(), ends, mesh.rows_rank


def test_all_axes() -> None:
    """Rank = (((pipeline · 1 + data) · 2 + expert) · 1 + context) · 2 + tensor."""
    found = run_ranks(one_rank, 8, {"pipeline": 2, "expert": 2, "tensor": 2}, True, 1)
    members, places, parameters, expert_parameters, ends, rows_rank = found[7]
    assert places == {"pipeline": 1, "data": 0, "expert": 1, "context": 0, "tensor": 1}
    assert members["tensor"] == [6, 7] and members["expert"] == [5, 7] and members["pipeline"] == [3, 7]
    assert members["tokens"] == [5, 7] and ends == [3, 7] and rows_rank == 1
    assert parameters == [[5, 7]] and expert_parameters == [[7]]


def test_copies_of_sharded_weights() -> None:
    found = run_ranks(one_rank, 4, {"data": 2, "context": 2}, True, 2)
    assert [rank[2] for rank in found] == [[[0, 1], [2, 3]]] * 4
    assert [rank[2] for rank in run_ranks(one_rank, 4, {"data": 2, "context": 2}, False, 1)] == [
        [[0], [1], [2], [3]]
    ] * 4


@pytest.mark.parametrize(
    ("sizes", "replicas", "message"),
    [
        ({"data": 2}, 1, "must multiply to the number of ranks, got data 2 for 3"),
        ({"data": 3}, 2, "must divide the data ranks, got 2 for 3"),
    ],
)
def test_what_does_not_fit_is_refused(sizes: dict[str, int], replicas: int, message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_ranks(one_rank, 3, sizes, True, replicas)
