"""Samples that cannot be used: counted over ranks and resumes; many of them stop a run."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

MAX_TOLD = 100_000  # lines of the file of bad samples
_MAX_SHARDS_SAVED = 100


class BadRecord(NamedTuple):
    """A sample that could not be used at a position; probe 0 is the sample itself, 1, 2, ... those
    tried in its place; lost: its shard cannot be used as a whole."""

    key: str
    shard: str
    reason: str
    position: int
    probe: int
    lost: bool = False


class BadSampleError(RuntimeError):
    """Too many bad samples; the message names the worst shard."""


@dataclass
class Counts:
    """What was seen.

    seen: samples. bad: those that could not be used while their shard could. by_shard: these, by
    shard. lost: shards that could not be used as a whole, and why. lost_samples: seen of them.
    """

    seen: int = 0
    bad: int = 0
    lost_samples: int = 0
    by_shard: Counter[str] = field(default_factory=Counter)
    lost: dict[str, str] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        """Take in another's; a shard that both lost counts once."""
        self.seen += other.seen
        self.bad += other.bad
        self.lost_samples += other.lost_samples
        self.by_shard.update(other.by_shard)
        self.lost.update(other.lost)

    def state(self) -> dict[str, Any]:
        """As plain data; of the shards with bad samples the worst hundred."""
        worst = dict(self.by_shard.most_common(_MAX_SHARDS_SAVED))
        return {**vars(self), "by_shard": worst, "lost": dict(self.lost)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Counts:
        """The inverse of `state`."""
        return cls(**{**state, "by_shard": Counter(state["by_shard"]), "lost": {**state["lost"]}})


class BadSampleLimit:
    """Counts bad samples in the training process, logs them, and stops beyond a limit.

    A rank judges what it has seen itself after every batch; `total` adds up the ranks and what a
    resumed run had seen before, to be saved with a checkpoint.

    Args:
        rate: largest share of the samples seen that may be bad; and of the shards that may be lost.
        shards: how many there are; 0 for a data set without, or where any may be lost.
        minimum: as many bad samples are always allowed, so that a run's first does not stop it.
        logged: bad samples logged one by one; after them only every hundredth.
        file: where each is told, a JSON object a line.
        before: what was seen until the checkpoint that the run continues from, by all ranks.
    """

    def __init__(
        self,
        rate: float = 0.01,
        *,
        shards: int = 0,
        minimum: int = 16,
        logged: int = 20,
        file: Path | None = None,
        before: dict[str, Any] | None = None,
    ) -> None:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"BadSampleLimit: rate={rate}; expected 0..1")
        self.rate, self.shards, self.minimum, self.logged = rate, shards, minimum, logged
        self.file, self.told = file, 0
        self.before = Counts() if before is None else Counts.of(before)
        self.counts = Counts()

    @property
    def seen(self) -> int:
        """Samples that this rank has seen."""
        return self.counts.seen

    @property
    def bad(self) -> int:
        """Those that were bad, without those of lost shards."""
        return self.counts.bad

    def update(self, batch: dict[str, Any]) -> None:
        """Count a batch of this rank's.

        Raises:
            BadSampleError: more than `rate` of the samples seen, and more than `minimum`, are bad;
                or more than `rate` of the shards are lost.
        """
        # Those tried in place of a bad sample did not come up by themselves: not counted.
        records = [record for record in batch["bad"] if record.probe == 0]
        lost = {r.shard: r.reason for r in records if r.lost}
        alone = [record for record in records if not record.lost]
        for shard in lost.keys() - self.counts.lost.keys():
            log.warning("shard %s is lost: %s", shard, lost[shard])
        by_shard = Counter(record.shard for record in alone)
        seen, lost_samples = len(batch["position"]), len(records) - len(alone)
        self.counts.add(Counts(seen, len(alone), lost_samples, by_shard, lost))
        for number, record in enumerate(alone, start=self.bad - len(alone) + 1):
            if number <= self.logged or number % 100 == 0:
                log.warning(
                    "bad sample %r in %s: %s (%d bad of %d seen)",
                    *(record.key, record.shard, record.reason, number, self.seen),
                )
        self._write(records)
        if records:
            last = f"{records[-1].key!r} in {records[-1].shard}: {records[-1].reason}"
            judge(self.counts, self.rate, self.shards, self.minimum, last=last)

    def _write(self, records: list[BadRecord]) -> None:
        if self.file is None or not records or self.told >= MAX_TOLD:
            return
        self.told += len(records)
        lines = []
        for record in records:
            told = record._asdict()
            del told["probe"], told["lost"]
            lines.append(json.dumps(told) + "\n")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:  # a full disk does not end the run
            log.warning("%s cannot be written: %s", self.file, error)

    def total(self, ranks: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """The run's counts: those before, and those of every rank since.

        Args:
            ranks: each rank's `counts.state()`.
        """
        return _sum([self.before.state(), *ranks]).state()

    def check(self, ranks: Iterable[dict[str, Any]]) -> None:
        """Raise BadSampleError where the ranks together are over the limit and none is alone.

        Args:
            ranks: each rank's `counts.state()`.
        """
        judge(_sum(ranks), self.rate, self.shards, self.minimum)


def _sum(states: Iterable[dict[str, Any]]) -> Counts:
    found = Counts()
    for state in states:
        found.add(Counts.of(state))
    return found


def judge(counts: Counts, rate: float, shards: int, minimum: int, *, last: str = "") -> None:
    """Raise BadSampleError where counts are over the limit; arguments as `BadSampleLimit`'s."""
    last = last and f"; last: {last}"
    if shards and len(counts.lost) > rate * shards:
        shard, reason = next(iter(counts.lost.items()))
        raise BadSampleError(
            f"{len(counts.lost)} of {shards} shards are lost, over the limit of {rate:.2%}; "
            f"{shard}: {reason}{last}"
        )
    if counts.bad > max(minimum, rate * (counts.seen - counts.lost_samples)):
        worst, count = counts.by_shard.most_common(1)[0]
        raise BadSampleError(
            f"{counts.bad} of {counts.seen} samples seen are bad, over the limit of {rate:.2%}; "
            f"worst shard {worst} ({count} of them){last}"
        )
