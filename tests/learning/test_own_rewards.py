"""Rewards of one's own: what they are called with, how they weigh, and the place of what goes wrong in them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup, VideoPatches
from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.config.reward_terms import RewardTerm, parse_rewards, weighted
from tempsamp_fast.learning.advantage import assign_advantages
from tempsamp_fast.learning.groups import reward_metrics, score
from tempsamp_fast.learning.own_rewards import reward_function, reward_terms, try_rewards
from tempsamp_fast.sample import Mode, Sample

SAMPLE = Sample("clip/0", Path("clip.mp4"), "a square", 12.0, ((2.0, 6.0),))
TEXTS = ["<answer> 2.00 to 6.00 </answer>", "<answer> 2.00 to 4.00 </answer>", "nothing"]
VIDEO = VideoPatches(torch.empty(0), (1, 2, 2), 1.0, torch.zeros(1))


def group(mode: Mode = "answer") -> RolloutGroup:
    completions = [Completion(torch.zeros(2, dtype=torch.int64), text) for text in TEXTS]
    return RolloutGroup(Prompt(SAMPLE, mode, torch.zeros(1, dtype=torch.int64), VIDEO), completions)


@pytest.fixture
def mine(tmp_path: Path) -> SimpleNamespace:
    """`mine.write(text)` is a file of rewards, `mine.term(name)` one of its functions, as `--rewards` names it."""
    number = [0]

    def write(text: str) -> str:
        number[0] += 1  # a file is run once
        path = tmp_path / f"mine_{number[0]}.py"
        path.write_text(text)
        return str(path)

    return SimpleNamespace(write=write, folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        (None, ()),
        ("tiou", (RewardTerm("tiou", 1.0),)),
        ("a/my.py:f=0.5, tiou=1", (RewardTerm("f", 0.5, "a/my.py"), RewardTerm("tiou", 1.0))),
        ("my.py:f = 0.5 , tiou =1", (RewardTerm("f", 0.5, "my.py"), RewardTerm("tiou", 1.0))),
        ("c:/x.py:f=-1e-1,tiou=0", (RewardTerm("f", -0.1, "c:/x.py"), RewardTerm("tiou", 0.0))),
    ],
)
def test_terms_are_read(text: str | None, terms: tuple[RewardTerm, ...]) -> None:
    assert parse_rewards(text) == terms


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tiou,", "'' is not"),
        ("my.py", "'my.py' is not"),
        ("my.txt:f", "'my.txt:f' is not"),
        ("tiou=much", "'tiou=much' is not"),
        ("tiou=nan", "'tiou=nan' is not"),
        ("tiou=inf", "'tiou=inf' is not"),
        ("tiou,my.py:tiou", "'tiou' comes twice"),
        ("format=2", "--format_weight"),
    ],
)
def test_what_is_no_term_is_named(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"^rewards: .*{named}"):
        AlgorithmConfig(rewards=text)


def test_the_task_has_its_reward_unless_others_are_named() -> None:
    assert reward_terms(AlgorithmConfig(), "highlight") == (RewardTerm("highlight"),)
    assert reward_terms(AlgorithmConfig(rewards="tiou=2"), "highlight") == (RewardTerm("tiou", 2.0),)
    with pytest.raises(ValueError, match=r"no reward 'tio'; choose from .*; did you mean 'tiou'"):
        reward_function(RewardTerm("tio"))


def test_own_rewards_are_called_with_what_they_take_and_weigh_as_asked(mine: SimpleNamespace) -> None:
    """Records hold them as they are; sums and advantages are of the weighted ones, the format's weight apart."""
    file = mine.write(
        "def brief(completions, samples):\n    return [1 / len(text) for text in completions]\n"
        "def asked(completions, mode, **more):\n    assert more.keys() == {'samples', 'require_tags', 'answer_form'}\n"
        "    return (float(mode == 'think') for _ in completions)\n"
    )
    algorithm = AlgorithmConfig(rewards=f"{file}:brief=10,tiou=2,{file}:asked=0", format_weight=3.0)
    scored = group("think")
    score(scored, "grounding", algorithm)
    expected = [{"brief": 1 / len(text), "tiou": iou, "asked": 1.0, "format": 0.0}
                for text, iou in zip(TEXTS, (1.0, 0.5, 0.0), strict=True)]  # fmt: skip
    assert [each.rewards for each in scored.completions] == expected
    sums = torch.tensor([10 * each["brief"] + 2 * each["tiou"] for each in expected])
    assign_advantages([scored], "grpo", algorithm)
    assert scored.advantages is not None
    torch.testing.assert_close(scored.advantages, (sums - sums.mean()) / (sums.std() + 1e-4))
    metrics = reward_metrics([scored], rewards=algorithm.rewards)
    assert metrics["reward/on_policy_mean"] == pytest.approx(float(sums.mean()))
    assert metrics["reward/brief"] == pytest.approx(sum(1 / len(text) for text in TEXTS) / 3)
    assert metrics["reward/std"] == pytest.approx(float(sums.std(unbiased=False)))
    assert weighted({"tiou": 0.5, "format": 1.0}, algorithm.rewards) == 2.0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = 1\ndef f(completions:\n  pass\n", "line 2: SyntaxError"),
        ("import math\nimport nowhere_to_be_found\n", "line 2: ModuleNotFoundError"),
        ("def g(completions):\n    return []\n", "no function 'f'; choose from g"),
        (
            "def help(x):\n    return x['no']\ndef f(c):\n    return [\n        help({}) for _ in c]\n",
            "line 2: KeyError",
        ),
        ("def f(c):\n    return float('x')\n", "line 2: ValueError: could not convert"),
        ("\ndef f(c):\n    return [1.0]\n", "line 2: f returned 1 rewards for 3 answers"),
        ("def f(c):\n    return ['a'] * len(c)\n", "line 1: f returned 'a' for answer 0; expected a finite number"),
        ("def f(c):\n    return [1, float('nan'), 0]\n", "line 1: f returned nan for answer 1"),
        ("def f(c):\n    return [0, 1, None]\n", "line 1: f returned None for answer 2"),
        ("def f(c):\n    return None\n", "line 1: f returned None; expected a list of 3 numbers"),
        ("def f(c):\n    return 0.5\n", "line 1: f returned 0.5; expected a list of 3 numbers"),
        ("def f(c, wanted):\n    return c\n", "line 1: TypeError: f.. missing .*'wanted'"),
        ("\ndef f():\n    return []\n", "line 2: TypeError"),
        ("\nasync def f(c):\n    return []\n", "line 2: f returned <coroutine .*; expected a list of 3 numbers"),
        ("def f(c):\n    raise SystemExit(0)\n", "line 2: SystemExit"),
        ("import sys\nsys.exit()\n", "line 2: SystemExit"),
        ("def f(c):\n    return f(c)\n", "line 2: RecursionError"),
        ("def f(c):\n    c.clear()\n    return c\n", "line 1: f returned 0 rewards for 3 answers"),
        ("from textwrap import indent as f\n", "textwrap.py|TypeError"),
        ("def f(c):\n\treturn c\n        return c\n", "line 3: TabError|line 3: IndentationError"),
        ("f = 3\n", "no function 'f'"),
    ],
)
def test_what_goes_wrong_in_it_names_file_and_line(mine: SimpleNamespace, text: str, named: str) -> None:
    file = mine.write(text)
    with pytest.raises(ValueError, match=rf"--rewards {file}: .*{named}"):
        score(group(), "grounding", AlgorithmConfig(rewards=f"{file}:f"))


def test_what_goes_wrong_in_a_file_beside_it_names_that_one_too(mine: SimpleNamespace) -> None:
    (mine.folder / "beside_yours.py").write_text("def half(text):\n    return 1 / (len(text) - len(text))\n")
    (mine.folder / "beside_broken.py").write_text("x = 1\ny = x.z\n")
    file = mine.write("from beside_yours import half\n\ndef f(c):\n    return [half(text) for text in c]\n")
    with pytest.raises(ValueError, match=rf"--rewards {file}: line 4: beside_yours\.py: line 2: ZeroDivisionError"):
        score(group(), "grounding", AlgorithmConfig(rewards=f"{file}:f"))
    file = mine.write("import beside_broken\n")
    with pytest.raises(ValueError, match=rf"--rewards {file}: line 1: beside_broken\.py: line 2: AttributeError"):
        reward_function(RewardTerm("f", 1.0, file))


def test_numbers_of_any_library_and_files_beside_it_are_taken(mine: SimpleNamespace) -> None:
    (mine.folder / "beside_mine.py").write_text("half = 0.5\n")
    file = mine.write("import torch\nfrom beside_mine import half\ndef f(c):\n    return torch.full((len(c),), half)\n")
    scored = group()
    score(scored, "grounding", AlgorithmConfig(rewards=f"{file}:f"))
    assert [each.rewards for each in scored.completions] == [{"f": 0.5}] * 3


def test_a_reward_may_have_dataclasses_whose_annotations_are_texts(mine: SimpleNamespace) -> None:
    lines = (
        "from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\n",
        "@dataclass\nclass Weight:\n    value: float = 0.25\n",
        "def f(c):\n    return [pickle.loads(pickle.dumps(Weight())).value for _ in c]\n",
    )
    scored = group()
    score(scored, "grounding", AlgorithmConfig(rewards=f"{mine.write(''.join(lines))}:f"))
    assert [each.rewards for each in scored.completions] == [{"f": 0.25}] * 3


def test_a_missing_file_and_a_name_of_the_package_are_refused(mine: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.py: no such file"):
        reward_function(RewardTerm("f", 1.0, "nowhere.py"))
    with pytest.raises(ValueError, match="has the name of a reward of the package"):
        reward_function(RewardTerm("tiou", 1.0, mine.write("def tiou(c):\n    return c\n")))


def test_a_reward_is_tried_before_anything_is_loaded(mine: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    file = mine.write("def f(c, samples):\n    return [len(samples[0].windows) * len(text) for text in c]\n")
    with caplog.at_level("INFO"):
        try_rewards(AlgorithmConfig(rewards=f"{file}:f"), "grounding", [SAMPLE])
    assert f"reward f: {len(TEXTS[0])} for the first true answer, 0 for an empty one" in caplog.text
