"""Topologies: which wires a message crosses, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from longspan.hardware.topology import TOPOLOGIES, Topology, lab, make_topology

PORT = Topology(name="port", num_ranks=4, shape="port", link_bytes_per_s=10.0)


def names(topology: Topology, src: int, dst: int) -> list[str]:
    return [topology.resources[wire].name for wire in topology.route(src, dst)]


def test_each_shape_takes_its_wires() -> None:
    assert names(PORT, 0, 3) == ["rank 0 out", "rank 3 in"]
    assert names(dataclasses.replace(PORT, shape="mesh"), 0, 3) == ["0->3"]
    assert names(dataclasses.replace(PORT, shape="shared"), 0, 3) == ["node 0 memory"]
    tree = dataclasses.replace(PORT, shape="tree", switch_size=2)
    assert names(tree, 0, 1) == ["rank 0 out", "rank 1 in"]
    assert names(tree, 0, 3) == ["rank 0 out", "node 0 switch 0 out", "node 0 switch 1 in", "rank 3 in"]


def test_the_two_directions_of_a_port_are_two_wires() -> None:
    assert not set(PORT.route(0, 1)) & set(PORT.route(1, 0))
    assert set(PORT.route(0, 1)) & set(PORT.route(0, 2)) and set(PORT.route(1, 0)) & set(PORT.route(2, 0))
    mesh = dataclasses.replace(PORT, shape="mesh")
    assert not set(mesh.route(0, 1)) & set(mesh.route(0, 2))


@pytest.mark.parametrize(("cards", "shared"), [("rank", False), ("node", True)])
def test_between_nodes_messages_cross_cards(cards, shared: bool) -> None:
    nodes = dataclasses.replace(
        PORT, node_size=2, cards=cards, card_bytes_per_s=1.0, latency_s=1.0, card_latency_s=5.0, flow_bytes_per_s=7.0
    )
    assert nodes.num_nodes == 2
    # Two ranks of a node that send to the other node at once share a wire only where the node has one card.
    assert bool(set(nodes.route(0, 2)) & set(nodes.route(1, 3))) is shared
    assert all("card" in name for name in names(nodes, 0, 2)) and names(nodes, 0, 1) == ["rank 0 out", "rank 1 in"]
    near, far = nodes.path(0, 1), nodes.path(0, 2)
    assert (near.latency_s, near.flow_bytes_per_s) == (1.0, 7.0) and (far.latency_s, far.flow_bytes_per_s) == (
        5,
        math.inf,
    )


def test_an_uplink_has_its_own_rate() -> None:
    tree = dataclasses.replace(PORT, shape="tree", switch_size=2, uplink_bytes_per_s=3.0)
    rates = {wire.name: wire.bytes_per_s for wire in tree.resources}
    assert rates["node 0 switch 1 in"] == 3.0 and rates["rank 3 out"] == 10.0
    assert len(rates) == len(tree.resources) == 2 * 4 + 2 * 2


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_presets_route_every_pair_and_survive_json(name: str) -> None:
    topology = make_topology(name, 11)  # a part of a second node, and of a PCIe switch
    assert Topology.from_json(topology.to_json()) == topology
    for src in range(11):
        for dst in range(11):
            if src != dst:
                route = topology.route(src, dst)
                assert route and len(set(route)) == len(route)
    assert all(wire.bytes_per_s > 0 for wire in topology.resources)


def test_the_lab_counts_in_bits() -> None:
    assert lab("port", 4, 100e6).resources[0].bytes_per_s == 12.5e6
    assert len(lab("mesh", 4, 100e6).resources) == 12


def test_a_rank_of_the_lab_pays_for_messages_and_bytes_with_its_share_of_a_core() -> None:
    whole, share = lab("port", 4, 100e6), lab("port", 4, 100e6, 0.4)
    assert whole.blocking and share.blocking  # gloo's sockets are served by the rank's own core
    assert share.message_s == pytest.approx(whole.message_s / 0.4)
    assert share.byte_s == pytest.approx(whole.byte_s / 0.4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "star"}, "shape must be one of port, mesh, tree, shared, got 'star'"),
        ({"cards": "two"}, "cards must be one of"),
        ({"num_ranks": 0}, "at least one rank"),
        ({"link_bytes_per_s": 0.0}, "link_bytes_per_s must be positive"),
        ({"latency_s": -1.0}, "latency_s must be at least 0"),
        ({"shape": "tree"}, "switch_size 0"),
        ({"node_size": 2}, "2 nodes need network cards"),
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PORT, **changes)


def test_unknown_ranks_and_names_are_refused() -> None:
    for src, dst in ((0, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match=r"two ranks of 0\.\.3"):
            PORT.route(src, dst)
    with pytest.raises(ValueError, match="unknown topology 'b200'; known: a10_pcie"):
        make_topology("b200", 8)


def test_json_that_is_no_topology_is_refused() -> None:
    good = json.loads(PORT.to_json())
    for bad in ("{", "[]", json.dumps(good | {"colour": "red"}), json.dumps({"name": "x"})):
        with pytest.raises(ValueError, match="a topology must be"):
            Topology.from_json(bad)
    with pytest.raises(ValueError, match="num_ranks of a topology must be int, got '4'"):
        Topology.from_json(json.dumps(good | {"num_ranks": "4"}))
