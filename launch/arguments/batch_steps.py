"""A global batch that grows in steps, as Megatron-LM's arguments describe it."""

import re
from dataclasses import dataclass
from itertools import pairwise

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class BatchSteps:
    """Global batches in sequences, each with the number of sequences after which it begins; the first with 0."""

    steps: tuple[tuple[int, int], ...]
    """(sequences trained on, global batch), in order."""

    @classmethod
    def constant(cls, batch: int) -> "BatchSteps":
        """One batch for the whole run."""
        return cls(((0, batch),))

    @classmethod
    def ramp(cls, start: int, increment: int, samples: int, largest: int) -> "BatchSteps":
        """`--rampup-batch-size start increment samples` with `--global-batch-size largest`, up to 0.17.

        Raises ValueError if the increments do not lead from the start to the largest batch, as Megatron-LM does.
        """
        if increment <= 0 or (largest - start) % increment or start > largest:
            raise ValueError(
                f"--rampup-batch-size {start} {increment} {samples}: {largest} − {start} = {largest - start} is not a "
                f"multiple of {increment}"
            )
        count = (largest - start) // increment
        steps = [(round(number * samples / count), start + number * increment) for number in range(count)]
        return cls((*steps, (samples, largest)) if count else ((0, largest),))

    @classmethod
    def parse(cls, text: str, seq_len: int) -> "BatchSteps":
        """`--step-batch-size-schedule "0:768 250B:1536"`, tokens and sequences, from 0.18 on.

        Raises ValueError for what is no such schedule.
        """
        steps = []
        for entry in text.replace(",", " ").split():
            match = re.fullmatch(r"([\d.]+)([KMBT]?):(\d+)", entry.upper())
            if match is None:
                raise ValueError(f"--step-batch-size-schedule: {entry!r} is not TOKENS:BATCH")
            steps.append((int(float(match[1]) * _SUFFIXES[match[2]]) // seq_len, int(match[3])))
        steps.sort()
        if not steps or steps[0][0] or any(before == after for (before, _), (after, _) in pairwise(steps)):
            raise ValueError(f"--step-batch-size-schedule {text!r}: thresholds begin with 0 and grow")
        return cls(tuple(steps))

    @property
    def largest(self) -> int:
        """The last batch."""
        return self.steps[-1][1]

    def samples_after(self, iterations: int) -> int:
        """Sequences that so many optimizer steps take."""
        samples = 0
        for (_, batch), following in zip(self.steps, [*self.steps[1:], None], strict=True):
            if following is None:
                return samples + iterations * batch
            taken = min(max(-(-(following[0] - samples) // batch), 0), iterations)
            samples, iterations = samples + taken * batch, iterations - taken
        return samples

    def increments(self) -> tuple[int, int, int] | None:
        """(start, increment, sequences of the ramp) if the batch grows by equal increments after equal stretches."""
        if len(self.steps) < 2:
            return None
        increments = {after - before for (_, before), (_, after) in pairwise(self.steps)}
        length = self.steps[-1][0]
        even = all(
            abs(place - number * length / (len(self.steps) - 1)) <= 1 for number, (place, _) in enumerate(self.steps)
        )
        if len(increments) > 1 or not even or min(increments) <= 0:
            return None
        return self.steps[0][1], increments.pop(), length

    def text(self, seq_len: int) -> str:
        """As `--step-batch-size-schedule` takes it, with tokens for thresholds."""
        return " ".join(f"{place * seq_len}:{batch}" for place, batch in self.steps)
