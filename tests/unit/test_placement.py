"""What each part reserves, and what is said where a cluster has no room for it."""

from cluster import placement
from cluster.placement import Need, Node, actor, lacking, needs, scorer_options
from configs.choices import Spread
from tests.harness import settings

PLACED = [
    "cluster.learner_cpus=1", "cluster.nodes.learner=role=learner", "cluster.actor_gpus=1",
    "cluster.nodes.actors=ray.io/accelerator-type=H100", "learner.ranks=2",
    "cluster.nodes.ranks=strict_spread", "reward.replicas=3", "cluster.reward_cpus=0.5",
    "cluster.nodes.reward=role=learner",
]  # fmt: skip


def node(name: str, role: str = "", **free: float) -> Node:
    return Node(name, {"role": role} if role else {}, dict.fromkeys(free, 8.0), free)


def test_the_bandit_reserves_nothing_so_that_a_laptop_waits_for_nothing():
    assert needs(settings("bandit"), 4) == {}
    assert scorer_options(settings("bandit")) == {"num_cpus": 0, "num_gpus": 0}


def test_ranks_are_reserved_together_and_actors_one_by_one():
    found = needs(settings("bandit", *PLACED), 2)
    assert set(found) == {"learner", actor(0), actor(1), "reward"}
    assert found["learner"].number == 2 and found["learner"].spread is Spread.strict_spread
    assert found[actor(1)].bundle == {"GPU": 1.0} and found[actor(1)].number == 1
    assert found[actor(1)].labels == {"ray.io/accelerator-type": "H100"}
    assert found["reward"].number == 3
    options = scorer_options(settings("bandit", *PLACED))
    assert options == {"num_cpus": 0.5, "num_gpus": 0, "label_selector": {"role": "learner"}}


def test_what_is_colocated_is_one_bundle_so_that_its_shares_are_of_one_gpu():
    assert needs(settings("gpu_1"), 1)["learner"].bundle == {"GPU": 1.0}
    assert set(needs(settings("gpu_1"), 1)) == {"learner"}


def test_two_nodes_of_eight_gpus_hold_the_preset_for_two_nodes():
    found = needs(settings("gpu_2_nodes"), 7)
    assert found["learner"].number == 8 and found["learner"].spread is Spread.strict_pack
    assert sum(need.number * need.bundle["GPU"] for need in found.values()) == 16


def test_a_line_names_the_part_the_node_and_what_it_lacks():
    need = Need("8 learner ranks", {"GPU": 1.0}, 8, "role=learner")
    told = lacking(need, [node("10.0.0.4", "learner", GPU=3), node("10.0.0.5", "rollout", GPU=8)])
    assert told == (
        "no room for 8 learner ranks (GPU 1 each, role=learner): room for 3 of 8; "
        "10.0.0.4 has GPU 3 of 8 free; 10.0.0.5 is not role=learner"
    )


def test_strict_ranks_count_one_node_or_one_rank_a_node():
    nodes = [node("a", GPU=3.0), node("b", GPU=4.0)]
    packed = Need("6 learner ranks", {"GPU": 1.0}, 6, spread=Spread.strict_pack)
    assert "cluster.nodes.ranks=strict_pack): room for 4 of 6;" in lacking(packed, nodes)
    spread = Need("3 learner ranks", {"GPU": 1.0}, 3, spread=Spread.strict_spread)
    assert "room for 2 of 3;" in lacking(spread, nodes)


def test_a_large_cluster_is_not_listed_whole():
    told = lacking(Need("rollout actor 3", {"CPU": 2.0}), [node(f"n{i}", CPU=1) for i in range(50)])
    assert told.endswith("n5 has CPU 1 of 8 free; 44 more nodes") and "\n" not in told


def test_no_node_at_all_is_said_too():
    assert lacking(Need("rollout actor 0", {"GPU": 1.0}), []).startswith("no room for rollout")


def test_a_group_that_lost_its_node_is_asked_for_anew_once(monkeypatch):
    """Ray would try to place it without a pause, a core of the head busy with it."""
    asked, left, state = [], [], {}

    def ask(bundles, strategy, bundle_label_selector):
        assert (bundles, bundle_label_selector) == ([{"CPU": 1.0}], [{"role": "rollout"}])
        asked.append(f"group {len(asked)}")
        state[asked[-1]] = "PENDING"
        return asked[-1]

    monkeypatch.setattr(placement, "placement_group", ask)
    monkeypatch.setattr(placement, "remove_placement_group", left.append)
    monkeypatch.setattr(placement, "placement_group_table", lambda group: {"state": state[group]})
    own = ["cluster.actor_cpus=1", "cluster.nodes.actors=role=rollout"]
    room = placement.Placement(settings("bandit", *own), print)
    room.add(0)
    assert not room.there(actor(0)) and asked == ["group 0"]
    state["group 0"] = "CREATED"
    assert room.there(actor(0)) and not left
    state["group 0"] = "RESCHEDULING"
    assert not room.there(actor(0)) and not room.there(actor(0))
    assert asked == ["group 0", "group 1"] and left == ["group 0"]
    state["group 1"] = "RESCHEDULING"  # lost as well, before anyone looked
    options = room.options(actor(0))
    assert asked[-1] == options["scheduling_strategy"].placement_group == "group 2"
