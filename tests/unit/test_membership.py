"""The transfer group's state machine: who is linked, when a new epoch begins."""

from hypothesis import given
from hypothesis import strategies as st

from learner.membership import Member, Membership, Plan

EVENTS = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "send", "break"]), st.integers(0, 3),
              st.sets(st.integers(0, 3))),
    max_size=40,
)  # fmt: skip


def with_actors(*actors: int) -> Membership:
    state = Membership()
    for actor in actors:
        state = state.joined(actor)
    return state


def send(state: Membership, absent: set[int] = frozenset()) -> tuple[Membership, Plan]:
    present = frozenset(m for m in state.alive if m.actor not in absent)
    plan = state.next(present)
    return (state.rebuilding(present) if plan is Plan.REBUILD else state), plan


def test_an_epoch_lasts_as_long_as_its_members():
    state, plan = send(with_actors(0, 1))
    assert plan is Plan.REBUILD and state.epoch == 1 and state.linked == state.alive
    assert send(state) == (state, Plan.KEEP)


def test_who_joins_is_linked_by_the_next_send_under_a_new_epoch():
    state, _ = send(with_actors(0))
    joined = state.joined(1)
    assert joined.linked == state.linked and joined.epoch == 1
    state, plan = send(joined)
    assert plan is Plan.REBUILD and state.epoch == 2 and len(state.linked) == 2


def test_a_restarted_actor_is_another_member_though_it_has_the_same_number():
    state, _ = send(with_actors(0, 1))
    again, plan = send(state.joined(1))
    assert plan is Plan.REBUILD and again.epoch == 2
    assert {m.actor for m in again.linked} == {0, 1} and again.linked != state.linked


def test_who_does_not_answer_is_left_out_until_it_does_and_is_not_forgotten():
    state, _ = send(with_actors(0, 1))
    state, plan = send(state, absent={1})
    assert plan is Plan.REBUILD and {m.actor for m in state.linked} == {0}
    assert send(state, absent={1})[1] is Plan.KEEP
    state, plan = send(state)
    assert plan is Plan.REBUILD and state.epoch == 3 and len(state.linked) == 2


def test_with_nobody_there_nothing_is_sent_and_no_epoch_begins():
    assert send(Membership())[1] is Plan.NOBODY
    state, plan = send(with_actors(0, 1), absent={0, 1})
    assert plan is Plan.NOBODY and state.epoch == 0


def test_after_a_failure_the_next_send_rebuilds_with_the_same_members():
    state, _ = send(with_actors(0, 1))
    again, plan = send(state.broken())
    assert plan is Plan.REBUILD and again.epoch == 2 and again.linked == state.linked


@given(EVENTS)
def test_whatever_happens_an_epoch_has_one_set_of_members_and_only_living_ones_are_sent_to(events):
    state, of_epoch = Membership(), {}
    for kind, actor, absent in events:
        before = state.epoch
        if kind == "join":
            state = state.joined(actor)
        elif kind == "leave":
            state = state.left(actor)
        elif kind == "break":
            state = state.broken()
        else:
            state, plan = send(state, absent)
            here = {m for m in state.alive if m.actor not in absent}
            if plan is not Plan.NOBODY:
                assert state.linked == here and here
                assert of_epoch.setdefault(state.epoch, state.linked) == state.linked
        assert before <= state.epoch <= before + (kind == "send")
        assert len({m.actor for m in state.alive}) == len(state.alive)
        assert all(isinstance(m, Member) for m in state.linked)
