"""kill -9 at random moments and before random changes of files; then on, and the result compared to the bit."""

from __future__ import annotations

import random
import signal
import time
from typing import Any

from bench.fault_campaign.children import World, difference, fresh, record, start, words_to_go_on


class Kills:
    """Disturbed runs of one undisturbed run, which is made first."""

    def __init__(self, world: World):
        self.world = world
        run = fresh(world.folder / "undisturbed")
        log = world.folder / "undisturbed.log"
        child = start(world.flags(run), log, kill_at=(run, 0))
        if child.wait():
            raise RuntimeError(f"the undisturbed run failed:\n{log.read_text()[-3000:]}")
        self.duration_s = time.monotonic() - child.started_s
        self.num_changes = log.read_text().count("change\n")
        self.undisturbed = record(run)

    def disturb(self, number: int) -> dict[str, Any]:
        """One run, killed once or twice; even numbers before a change of a file, odd ones after a time.

        `killed` names the kills that landed, `missed` the one that came after the end of the run, if one did.
        """
        draw = random.Random(number)
        run = fresh(self.world.folder / f"killed_{number:03d}")
        log = run.with_suffix(".log")
        facts: dict[str, Any] = {"killed": []}
        for _ in range(draw.choice((1, 1, 2))):
            words = words_to_go_on(self.world, run)
            if number % 2 == 0:
                change = draw.randint(1, self.num_changes)
                code = start(words, log, kill_at=(run, change)).wait()
                where = f"before change {change} of a file"
            else:
                after_s = draw.uniform(0, self.duration_s)
                child = start(words, log)
                time.sleep(after_s)
                child.signal(signal.SIGKILL)
                code, where = child.wait(), f"after {after_s:.2f} s"
            if code == 0:
                facts["missed"] = where
                break
            if code != -signal.SIGKILL:
                return {**facts, "outcome": f"ended with {code} {where}: {log.read_text()[-500:]}"}
            facts["killed"].append(where)
        facts["left"] = sorted(path.name for path in (run / "checkpoints").glob("*")) if run.exists() else []
        code = start(words_to_go_on(self.world, run), log).wait()
        if code:
            return {**facts, "outcome": f"resume ended with {code}: {log.read_text()[-500:]}"}
        differs = difference(run, self.undisturbed)
        if not differs:
            fresh(run)
        return {**facts, "outcome": f"differs in {differs}" if differs else "equal"}
