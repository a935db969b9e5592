"""Which steps a run makes, in what order, and how many seconds each may take.

Steps are planned by priority: a run that is too short for all of them drops the last ones. A step
that ends early leaves its time to those behind it; a step that is late is stopped where the next
one begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

CLOSING = 8.0  # seconds at the end for the last files and the summary


@dataclass(frozen=True)
class Step:
    """One step, run in processes of its own.

    Attributes:
        name: as progress lines have it.
        what: for the order list.
        seconds: planned in a run that has time for everything.
        least: with fewer it is dropped.
        priority: 1 is kept the longest.
        cap: seconds that one of its cases may take.
        shards: processes that share its cases.
        beside: the step that it runs next to; it takes no time of its own.
        extra: a failure of it is reported, but does not change the exit status.
        gpu: its processes use the GPU themselves.
    """

    name: str
    what: str
    seconds: float
    least: float
    priority: int
    cap: float
    shards: int = 1
    beside: str = ""
    extra: bool = False
    gpu: bool = True


@dataclass(frozen=True)
class Slot:
    """A step with its planned start and seconds, counted from the start of the run."""

    step: Step
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


# In the order of a run. The sum of the seconds is that of a run of eight minutes.
STEPS = (
    Step("check", "every op against float64, values and gradients", 48, 30, 1, 40, shards=6),
    Step("ceilings", "a large copy, a large matrix product", 10, 8, 1, 20),
    Step("ours", "every op timed against a copy, by graph replay", 32, 20, 2, 15),
    Step(
        *("plan", "what `fastdiff plan` says of the training steps", 0, 0, 2, 60),
        beside="ours",
        extra=True,
        gpu=False,
    ),
    Step("tests", "the kernels' tests on all cores", 90, 60, 4, 90),
    Step(
        *("warm", "Inductor compiles the rivals", 0, 0, 4, 80),
        shards=2,
        beside="tests",
        extra=True,
    ),
    Step("rivals", "the nine goal ops against eager, torch.compile, Flex", 92, 40, 6, 40),
    Step("blocks", "two IU-ViT blocks against eager, torch.compile, the floor", 40, 25, 9, 60),
    Step("attention", "global attention by flash-attn and xformers", 10, 6, 11, 20),
    Step("ascend", "a step of ascend_t2i_128 against eager", 50, 35, 10, 75),
    Step("kernels", "time of each kernel, by torch.profiler", 15, 10, 5, 15, extra=True),
    Step(
        *("host", "time of a call on the host: Python, dispatch, launcher", 16, 12, 8, 30),
        extra=True,
        gpu=False,
    ),
    Step(
        *("counters", "counters of the two worst kernels, by ncu", 33, 24, 8, 50),
        extra=True,
        gpu=False,
    ),
    Step("train ascend", "a training step of ascend_t2i_128, eager and graph", 22, 16, 3, 45),
    Step("train iuvit", "a training step of iuvit_cifar10, eager and graph", 12, 10, 7, 45),
    Step("rest", "rivals of the other ops", 0, 0, 12, 40),
)


def plan(steps: Sequence[Step], seconds: float) -> tuple[list[Slot], list[Step]]:
    """Give steps their time, in the order of their priority, while there is any.

    Args:
        steps: in the order in which they run; the last one gets what is left over.
        seconds: of the run.

    Returns:
        The slots, in order; and the steps that there is no time for.
    """
    spare = max(0.0, seconds - CLOSING)
    own = [step for step in steps if not step.beside]
    kept: dict[str, float] = {}
    for step in sorted(own, key=lambda s: s.priority):
        if spare >= step.least or not kept:
            kept[step.name] = min(step.seconds, spare)
            spare -= kept[step.name]
    if own and own[-1].name in kept:
        kept[own[-1].name] += spare
    slots, starts, at = [], {}, 0.0
    for step in own:
        if step.name in kept:
            starts[step.name] = (at, kept[step.name])
            at += kept[step.name]
    for step in steps:
        main = step.beside or step.name
        if main in starts:
            slots.append(Slot(step, *starts[main]))
    names = {slot.step.name for slot in slots}
    return slots, [step for step in steps if step.name not in names]


def stretched(step: Step, factor: float) -> Step:
    """The same with more time."""
    return replace(
        step, seconds=factor * step.seconds, least=factor * step.least, cap=factor * step.cap
    )


def order_list(slots: Sequence[Slot], dropped: Sequence[tuple[Step, str]]) -> list[str]:
    """The plan as it is printed first.

    Args:
        slots: what `plan` gave.
        dropped: steps that are not made, and why.
    """
    lines = ["start  seconds  step"]
    for slot in slots:
        if slot.step.beside:
            lines.append(
                f"{slot.start:5.0f}   beside  {slot.step.name}: {slot.step.what} "
                f"(next to {slot.step.beside})"
            )
        else:
            lines.append(
                f"{slot.start:5.0f}  {slot.seconds:7.0f}  {slot.step.name}: {slot.step.what}"
            )
    lines += [f"    -        -  {step.name}: not made: {why}" for step, why in dropped]
    return lines
