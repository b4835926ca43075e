"""The judge of the crash harness is not blind: each kind of fault, in a history made by hand, is found; what is right is not."""

import pytest

from tests.crashes import cases, hosts
from tests.crashes.verdict import Asked, Facts, Killed, Received, Verdict, Written, judge, story

KEY, OTHER = "k1", "k2"
LOST_BUS = "network: no connection to the bus"
UNKNOWN = "outcome unknown: paper broke off before it had answered; the order may be alive"


def asked(
    sent_ms: float,
    until_ms: float,
    *,
    key: str = KEY,
    order_id: str = "",
    error: str = "",
    broke: str = "",
    bridge: str = "bridge-1",
    cancels: str = "",
    done: bool = False,
) -> Asked:
    """A request about order 1; without an answer given it is told nothing."""
    data = {"id": order_id} if order_id else True if done else None
    return Asked(order=1, key=key, bridge=bridge, sent_ms=sent_ms, until_ms=until_ms, data=data, error=error, broke=broke, cancels=cancels)


def executed(at_ms: float, order_id: str, *, key: str = KEY, now: str = "open") -> Received:
    return Received(verb="POST", key=key, at_ms=at_ms, executed=True, id=order_id, now=now)


def intent(at_ms: float, *, key: str = KEY, process: str = "worker-a") -> Written:
    return Written(key=key, record="intent", at_ms=at_ms, process=process)


def outcome(at_ms: float, state: str, order_id: str = "", *, key: str = KEY, by: str = "worker") -> Written:
    return Written(key=key, record="outcome", at_ms=at_ms, state=state, id=order_id, by=by)


def unknown(at_ms: float) -> Written:
    return Written(key=KEY, record="unknown", at_ms=at_ms, state="unknown")


PLACED = [intent(2), outcome(5, "placed", "7")]
"""The journal of an order that went well."""


def found(facts: Facts) -> list[str]:
    return sorted(finding.kind for finding in judge(facts).findings)


def test_an_order_that_went_well_is_right() -> None:
    facts = Facts([asked(0, 6, order_id="7")], [executed(3, "7")], PLACED)
    assert judge(facts) == Verdict(findings=[], orders=1, ambiguous=0, kills=0)


def test_a_refused_order_is_right() -> None:
    refusal = Received(verb="POST", key=KEY, at_ms=3, executed=False, code=2010)
    facts = Facts([asked(0, 6, error="paper 2010 not enough is free")], [refusal], [intent(2), outcome(5, "refused")])
    assert judge(facts) == Verdict(findings=[], orders=1)


def test_a_repetition_with_the_same_answer_is_right() -> None:
    facts = Facts([asked(0, 6, order_id="7"), asked(9, 12, order_id="7", bridge="bridge-2")], [executed(3, "7")], PLACED)
    assert found(facts) == []


def test_an_unknown_order_that_is_settled_either_way_is_right() -> None:
    settled = [intent(2), unknown(6), outcome(50, "placed", "7", by="settler")]
    assert found(Facts([asked(0, 9, error=UNKNOWN)], [executed(3, "7")], settled)) == []
    settled[-1] = outcome(50, "absent", by="settler")
    assert found(Facts([asked(0, 9, error=UNKNOWN)], [], settled)) == []


def test_an_order_that_never_reached_the_journal_or_the_exchange_is_right() -> None:
    assert judge(Facts([asked(0, 1, error=LOST_BUS)])) == Verdict(findings=[], orders=1)


# ---------------------------------------------------------------- doubles


def test_two_executions_under_one_key_are_a_double() -> None:
    facts = Facts([asked(0, 6, order_id="7"), asked(9, 12, order_id="7")], [executed(3, "7"), executed(10, "8")], PLACED)
    assert found(facts) == ["double"]


def test_two_executions_of_a_retry_loop_are_a_double_whatever_it_was_told() -> None:
    journal = [intent(2), unknown(6), outcome(50, "placed", "7"), intent(61, key=OTHER), outcome(65, "placed", "8", key=OTHER)]
    facts = Facts(
        [asked(0, 9, error=UNKNOWN), asked(60, 66, key=OTHER, order_id="8")],
        [executed(3, "7"), executed(63, "8", key=OTHER)],
        journal,
    )
    assert found(facts) == ["double"]


def test_the_second_attempt_of_a_retry_loop_after_a_true_refusal_is_right() -> None:
    facts = Facts(
        [asked(0, 9, error=LOST_BUS), asked(60, 66, key=OTHER, order_id="8")],
        [executed(63, "8", key=OTHER)],
        [intent(61, key=OTHER), outcome(65, "placed", "8", key=OTHER)],
    )
    assert judge(facts) == Verdict(findings=[], orders=1)


def test_an_order_that_nobody_asked_for_is_a_double() -> None:
    facts = Facts([asked(0, 6, order_id="7")], [executed(3, "7"), executed(4, "8", key="random")], PLACED)
    assert found(facts) == ["double"]


# ---------------------------------------------------------------- lost


def test_an_execution_without_an_intent_is_lost() -> None:
    assert found(Facts([asked(0, 6, order_id="7")], [executed(3, "7")], [])) == ["lost"]


def test_an_execution_without_an_outcome_is_lost_and_unsettled() -> None:
    assert found(Facts([asked(0, 6, error=UNKNOWN)], [executed(3, "7")], [intent(2), unknown(6)])) == ["lost", "unsettled"]


def test_an_execution_whose_outcome_is_unknown_for_good_is_lost_and_unsettled() -> None:
    assert found(Facts([asked(0, 6, error=UNKNOWN)], [executed(3, "7")], [intent(2), outcome(6, "unknown")])) == ["lost", "unsettled"]


def test_an_acknowledged_order_that_the_exchange_does_not_have_is_lost() -> None:
    assert found(Facts([asked(0, 6, order_id="7")], [], [intent(2), outcome(5, "absent")])) == ["lost"]


# ---------------------------------------------------------------- lies


@pytest.mark.parametrize(
    "error", [LOST_BUS, "timeout: no answer from paper in time", "paper 2010 not enough is free", "fenced: an equal order is unknown"]
)
def test_any_error_but_unknown_for_an_executed_order_is_a_lie(error: str) -> None:
    assert found(Facts([asked(0, 6, error=error)], [executed(3, "7")], PLACED)) == ["lie"]


def test_an_order_that_is_executed_after_its_host_was_told_no_is_a_lie() -> None:
    assert found(Facts([asked(0, 6, error="timeout: too late; nothing was sent")], [executed(30, "7")], PLACED)) == ["lie"]


def test_a_repetition_may_be_told_that_it_did_nothing_itself() -> None:
    broken = asked(0, 6, broke="ServerDisconnectedError")
    assert found(Facts([broken, asked(9, 10, error=LOST_BUS)], [executed(3, "7")], PLACED)) == []


@pytest.mark.parametrize("error", ["timeout: no answer from paper in time", "network: paper answered 503", "journal full: order not sent"])
def test_a_repetition_must_not_be_told_that_the_order_was_not_placed(error: str) -> None:
    assert found(Facts([asked(0, 6, order_id="7"), asked(9, 10, error=error)], [executed(3, "7")], PLACED)) == ["lie"]


def test_what_was_true_when_it_was_told_is_no_lie_when_a_later_request_places_the_order() -> None:
    told = asked(0, 6, error="timeout: no answer from paper in time")
    assert found(Facts([told, asked(9, 15, order_id="7")], [executed(12, "7")], [intent(10), outcome(14, "placed", "7")])) == []
    assert found(Facts([told, asked(9, 15, order_id="7")], [executed(5, "7")], PLACED)) == ["lie"]
    assert found(Facts([told, asked(4, 15, order_id="7")], [executed(12, "7")], PLACED)) == ["lie"]


def test_a_request_that_found_nobody_excuses_no_other() -> None:
    facts = Facts([asked(0, 1, broke="refused"), asked(2, 9, error=LOST_BUS)], [executed(5, "7")], PLACED)
    assert found(facts) == ["lie"]


def test_another_orders_id_is_a_lie() -> None:
    assert found(Facts([asked(0, 6, order_id="8")], [executed(3, "7")], PLACED)) == ["lie"]
    facts = Facts([asked(0, 6, order_id="8")], [executed(1, "8", key="other")], [])
    assert found(facts) == ["double", "lie"]


@pytest.mark.parametrize("state", ["absent", "refused"])
def test_a_journal_that_denies_an_execution_lies(state: str) -> None:
    assert found(Facts([asked(0, 6, error=UNKNOWN)], [executed(3, "7")], [intent(2), outcome(9, state)])) == ["lie"]


@pytest.mark.parametrize("received", [[], [executed(3, "8")]], ids=["never executed", "another id"])
def test_a_journal_that_claims_an_execution_lies(received: list[Received]) -> None:
    assert found(Facts([asked(0, 6, error=UNKNOWN)], received, PLACED)) == ["lie"]


def cancelled(now: str, *rows: Received, cancels: list[Asked]) -> list[str]:
    return found(Facts([asked(0, 6, order_id="7"), *cancels], [executed(3, "7", now=now), *rows], PLACED))


DELETED = Received(verb="DELETE", key=KEY, at_ms=9, executed=True, id="7", now="cancelled")


def test_a_cancel_answered_true_for_an_order_that_stays_open_is_a_lie() -> None:
    assert cancelled("open", cancels=[asked(8, 12, key="c", cancels="7", done=True)]) == ["lie"]
    assert cancelled("cancelled", DELETED, cancels=[asked(8, 12, key="c", cancels="7", done=True)]) == []


def test_a_cancel_told_as_failed_that_was_executed_is_a_lie() -> None:
    denied = asked(8, 12, key="c", cancels="7", error="network: paper answered 503")
    assert cancelled("cancelled", DELETED, cancels=[denied]) == ["lie"]
    assert cancelled("cancelled", DELETED, cancels=[asked(8, 9, key="d", cancels="7", broke="gone"), denied]) == []
    assert cancelled("open", cancels=[denied]) == []
    assert cancelled("cancelled", DELETED, cancels=[asked(8, 12, key="c", cancels="7", error=UNKNOWN)]) == []


# ---------------------------------------------------------------- unsettled


def test_an_intent_without_an_outcome_is_unsettled_even_if_nothing_was_sent() -> None:
    assert found(Facts([asked(0, 6, error=UNKNOWN)], [], [intent(2)])) == ["unsettled"]


def test_credentials_that_stay_behind_an_outcome_are_unsettled() -> None:
    assert found(Facts([asked(0, 6, order_id="7")], [executed(3, "7")], PLACED, left=[KEY])) == ["unsettled"]


# ---------------------------------------------------------------- what was at stake


@pytest.mark.parametrize(
    ("facts", "ambiguous"),
    [
        (Facts([asked(0, 6, order_id="7")], [executed(3, "7")], PLACED), 0),
        (Facts([asked(0, 6, error=UNKNOWN)], [executed(3, "7")], PLACED), 1),
        (Facts([asked(0, 6, broke="patience"), asked(7, 8, order_id="7")], [executed(3, "7")], PLACED), 1),
        (Facts([asked(0, 1, broke="refused"), asked(2, 8, order_id="7")], [executed(3, "7")], PLACED), 0),
        (Facts([asked(0, 6, order_id="7")], [executed(3, "7")], [unknown(4), *PLACED]), 1),
        (Facts([asked(0, 6, order_id="7")], [executed(3, "7")], [intent(2), outcome(5, "placed", "7", by="settler")]), 1),
        (Facts([asked(0, 6, error=LOST_BUS)]), 0),
    ],
    ids=["told", "told unknown", "no patience", "nobody there", "marked", "looked up", "no bus"],
)
def test_an_order_is_ambiguous_when_its_fate_was_unclear_for_a_time(facts: Facts, ambiguous: int) -> None:
    assert judge(facts).ambiguous == ambiguous


@pytest.mark.parametrize(
    ("kill", "hit"),
    [
        (Killed(part="nats", at_ms=3), 1),
        (Killed(part="paper", at_ms=3), 1),
        (Killed(part="paper", at_ms=1), 0),
        (Killed(part="paper", at_ms=5), 0),
        (Killed(part="worker-1", at_ms=3, process="worker-a"), 1),
        (Killed(part="worker-2", at_ms=3, process="worker-b"), 0),
        (Killed(part="worker-1", at_ms=3), 0),
        (Killed(part="bridge-1", at_ms=3), 1),
        (Killed(part="bridge-2", at_ms=3), 0),
    ],
)
def test_a_kill_counts_between_intent_and_outcome_and_on_the_orders_way_only(kill: Killed, hit: int) -> None:
    facts = Facts([asked(0, 6, order_id="7")], [executed(3, "7")], PLACED, [kill])
    assert judge(facts) == Verdict(findings=[], orders=1, kills=hit)


def test_a_kill_counts_once_for_an_order_of_two_keys() -> None:
    journal = [intent(2), intent(2, key=OTHER)]
    facts = Facts([asked(0, 6, error=UNKNOWN), asked(0, 6, key=OTHER, error=UNKNOWN)], [], journal, [Killed(part="nats", at_ms=3)])
    assert judge(facts).kills == 1
    assert judge(facts).orders == 1


# ---------------------------------------------------------------- cases


def test_a_case_is_drawn_from_its_seed_and_number_alone() -> None:
    assert cases.draw(1, 17) == cases.draw(1, 17)
    assert cases.draw(1, 17) != cases.draw(2, 17)
    assert cases.draw(1, 17) != cases.draw(1, 18)


def test_two_hundred_cases_mean_enough_orders_of_all_sorts() -> None:
    drawn = [cases.draw(1, number) for number in range(1, 201)]
    steps = [step for case in drawn for plan in case.plans for step in plan.steps]
    assert len(steps) >= 2200
    assert {step.conduct for step in steps} == set(hosts.CONDUCTS)
    assert {case.weather.event.part for case in drawn} == {"nats", "paper", "sender", "bridge-1", "bridge-2"}
    for case in drawn:
        orders = [step.order for plan in case.plans for step in plan.steps]
        assert len({(one.symbol, one.side, one.price, one.amount) for one in orders}) == len(orders)
        nonces = [nonce for plan in case.plans for step in plan.steps for nonce in step.nonces]
        assert len(set(nonces)) == len(nonces)
        assert all(nonce >= 10**18 and nonce % 10**6 for nonce in nonces)


def test_a_story_tells_everything_about_an_order_in_order_of_time() -> None:
    facts = Facts([asked(1000, 1006, order_id="7")], [executed(1003, "7")], [intent(1002)], [Killed(part="nats", at_ms=1004)])
    lines = story(facts, 1, KEY)
    assert [line.split()[1] for line in lines] == ["asked", "journal", "exchange", "killed"]
    assert [float(line.split()[0]) for line in lines] == [0, 2, 3, 4]
