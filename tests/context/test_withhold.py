"""One rank alone, from recorded arrivals: the same bits as among the others. Its times need a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from longspan.attention import masks
from longspan.attention.kernels import pick
from longspan.context import withhold
from longspan.context.build import checked_schedule
from longspan.context.choose import default_layout
from longspan.context.emulate import Played, emulate
from longspan.context.engine import Settings
from longspan.context.geometry import Geometry
from tests.context.cases import inputs


class InstantWire:
    """Delivers when it is waited for: whoever reads earlier reads zeros."""

    def __init__(self) -> None:
        self.stream = SimpleNamespace(wait_stream=lambda stream: None)

    def deliver(self, messages: list[torch.Tensor], places: list[torch.Tensor]) -> SimpleNamespace:
        def land() -> None:
            for place, message in zip(places, messages, strict=True):
                place.copy_(message)

        for place in places:
            place.zero_()
        return SimpleNamespace(wait=land)


@pytest.mark.parametrize(
    "method", ["zigzag", "token_ring", "mask_aware:2", "kept_keys", "ulysses", "light_seq", "burst"]
)
def test_a_rank_alone_computes_what_it_computes_among_others(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    world, mask = 4, masks.documents([31, 3, 40])
    layout = default_layout(mask, world, method)
    q, k, v, dout = inputs(mask.num_tokens, 4, 2, torch.float32)
    settings = Settings(pick(q, softcap=None), 0.7, None)
    schedule, geometry = checked_schedule(mask, layout, method, 4, 2), Geometry(mask, layout)
    played: list[Played] = []
    whole = emulate(schedule, geometry, q, k, v, settings, dout, played)
    assert whole.grads is not None
    for phase, parts in zip(played, ((whole.out,), whole.grads), strict=True):
        for rank in range(world):
            worker = withhold._run(
                phase.programs[rank],
                phase.inputs[rank],
                settings,
                phase.saved[rank],
                phase.outs[rank],
                phase.arrivals[rank],
                InstantWire(),  # pyright: ignore[reportArgumentType]
            )
            own = torch.from_numpy(layout.positions(rank))
            found = worker.result(0)[:1] if len(parts) == 1 else (*worker.result(0), *worker.result(1))
            for mine, expected in zip(found, parts, strict=True):
                assert torch.equal(mine.to(q.dtype), expected.index_select(1, own))
