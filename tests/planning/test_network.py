"""What many GPUs are foretold to take: messages, their seconds on a network, and waiting."""

from __future__ import annotations

import pytest

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.model.architectures import count_parameters, model_config
from tempsamp_fast.plan import main
from tempsamp_fast.planning.estimate import work_of
from tempsamp_fast.planning.forecast import Forecast
from tempsamp_fast.planning.network import Message, Network, idle_share, step_messages, step_on

EXACT = Network(share=1.0, hop_us=1e-9)


@pytest.mark.parametrize(
    ("kind", "num_gpus", "seconds"),
    [
        ("all_reduce", 8, 2 * 7 / 8 * 45e9 / 450e9),
        ("all_gather", 8, 7 / 8 * 45e9 / 450e9),
        ("all_gather", 64, 63 / 64 * 45e9 / 400e9),  # through the eight adapters of a node together
        ("all_to_all", 64, 63 / 64 * 45e9 / 50e9),  # through one's own
        ("reduce_scatter", 1, 0.0),
    ],
)
def test_a_message_takes_what_the_narrowest_link_lets_through(kind: str, num_gpus: int, seconds: float) -> None:
    message = Message("update", kind, 45e9)  # type: ignore[arg-type]
    assert EXACT.seconds(message, num_gpus) == pytest.approx(seconds)
    assert Network(share=0.5, hop_us=1e-9).seconds(message, num_gpus) == pytest.approx(2 * seconds)


def test_a_message_of_nothing_takes_its_hops_there_and_back() -> None:
    """Three to the furthest of eight GPUs."""
    assert Network(hop_us=5.0).seconds(Message("update", "all_reduce", 0.0), 8) == pytest.approx(2 * 3 * 5e-6)


def test_only_what_nothing_is_computed_beside_is_waited_for() -> None:
    """Of an update of 3 s in two rows, a reduction beside the last backward pass has 1 s."""
    one = Forecast(update_s=3.0, sampling_s=2.0, labels=())
    reduce_s = EXACT.seconds(Message("update", "all_reduce", 900e9), 8)
    assert reduce_s == pytest.approx(3.5)
    for is_beside, expected in ((True, reduce_s - 1.0), (False, reduce_s)):
        messages = [Message("update", "all_reduce", 900e9, is_beside)]
        assert step_on(8, one, messages, 2, [100], EXACT).network_s == pytest.approx(expected)
    gathers = [
        Message("update", "all_gather", 90e9, True),
        Message("rollout", "all_gather", 90e9),
        Message("rollout", "all_gather", 90e9, True),
    ] * 2
    assert step_on(8, one, gathers, 2, [100], EXACT).network_s == pytest.approx(2 * 0.175)


def test_ranks_wait_for_the_one_with_the_longest_video() -> None:
    assert idle_share([100], 8, 2) == 0
    assert idle_share([100, 300], 8, 1) > idle_share([100, 300], 8, 4) > 0
    step = step_on(4, Forecast(3.0, 2.0, ()), [], 1, [100, 300], EXACT)
    idle = idle_share([100, 300], 4, 1)
    assert step.waiting_s == pytest.approx(5.0 * idle / (1 - idle)) and step.seconds == 5.0 + step.waiting_s


@pytest.mark.parametrize(
    ("words", "gathers", "reduced"),
    [
        (("--zero_stage", "0"), 0, 1),
        (("--zero_stage", "1"), 1, 1),
        (("--zero_stage", "2"), 1, 1),
        (("--zero_stage", "2", "--reduce_gradients", "row"), 1, 3),
    ],
)
def test_gradients_are_reduced_once_and_weights_handed_back(words: tuple, gathers: int, reduced: int) -> None:
    config = parse_args(["--model", "tiny", *words])
    shape = model_config(config.model)
    parameters = count_parameters(shape, config.model)
    messages = step_messages(work_of((2, 4, 4), shape, "grpo", 4, 10), parameters, config, 4, 3)
    found = {
        kind: sum(each.num_bytes for each in messages if each.kind == kind) for kind in ("all_gather", "all_reduce")
    }
    assert found == {"all_gather": gathers * 4 * parameters.total, "all_reduce": reduced * 4 * parameters.total}


@pytest.mark.parametrize(("method", "passes", "rollouts"), [("sft", 1, 0), ("grpo", 2, 1)])
def test_stage_3_gathers_what_every_row_and_pass_reads(method: str, passes: int, rollouts: int) -> None:
    """In three rows: the text for policy and reference, the frozen tower by itself, and all of it for a rollout."""
    config = parse_args(["--model", "tiny", "--zero_stage", "3", "--freeze_vision", "--beta", "0.04"])
    shape = model_config(config.model)
    parameters = count_parameters(shape, config.model)
    messages = step_messages(work_of((2, 4, 4), shape, method, 4, 10), parameters, config, 4, 3)
    found = {
        kind: sum(each.num_bytes for each in messages if (each.phase, each.kind) == kind)
        for kind in (("rollout", "all_gather"), ("update", "all_gather"), ("update", "reduce_scatter"))
    }
    text = parameters.total - parameters.vision
    gathers = 3 * parameters.vision + rollouts * parameters.total, 3 * passes * text, 3 * text
    assert list(found.values()) == [4 * number for number in gathers]


def test_a_plan_of_many_gpus_says_where_it_stops_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "charades_qwen2_5_vl_7b", "--gpus", "512", "--measured", "bench/results/rehearsal.json"]
    assert main(words) == 0
    good = capsys.readouterr().out
    assert [line.split()[0] for line in good.splitlines() if line.endswith(" %")][:4] == ["1", "8", "64", "512"]
    assert "stays above 80% to 4096 GPUs" in good and "predicted with 20 tokens an answer" in good
    assert main([*words, "--network_gbs", "0.1"]) == 0
    assert "falls below 80% at 16 GPUs" in capsys.readouterr().out
    assert main([*words, "--network_gbs", "0"]) == 2
    assert "must be positive" in capsys.readouterr().err
    assert main([*words, "--share", "2"]) == 2
    assert "--share 2.0: at most 1" in capsys.readouterr().err
