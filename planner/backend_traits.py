"""The properties of a training backend that decisions depend on. No torch, no framework."""

from typing import TYPE_CHECKING, ClassVar, NamedTuple

from planner.noise_sources import MICROBATCH, NORMLAYER, REPLICA
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.model_shape import ModelShape

if TYPE_CHECKING:
    from profiles.memory.implementation import Implementation


class PartCount(NamedTuple):
    """The equal parts that a noise source divides a step into."""

    number: int
    """J, the number of parts. One part has nothing to be compared with."""
    size: int
    """n, sequences in a part."""


class BackendTraits:
    """What a backend can run, which parts of a gradient it can measure, and how it uses memory.

    The planner and profiling know a backend by this class alone. The class itself has no limits; the base of all
    backends, `copus.backends.description.BackendDescription`, inherits from it.
    """

    framework: ClassVar[str] = ""
    """The distribution that trains, such as `megatron-core`. Measurements name it with its version."""
    largest_zero: ClassVar[int] = 3
    """The highest ZeRO stage that it runs."""
    zero_stages: ClassVar[tuple[int, ...] | None] = None
    """ZeRO stages that the planner may choose; None if it keeps the job's."""
    offloads_optimizer: ClassVar[bool] = False
    """Whether it can keep the optimizer state in the host's memory (`Layout.offload_optimizer`)."""
    shards_within_nodes: ClassVar[bool] = False
    """Whether the planner may choose hybrid sharding: one copy of the state on every node."""

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError for a layout that it does not run."""
        if layout.zero > self.largest_zero:
            raise ValueError(f"zero({layout.zero}) is not supported by this backend: at most {self.largest_zero}")
        if layout.offload_optimizer and not self.offloads_optimizer:
            raise ValueError("offload_optimizer(true) is not supported by this backend")

    def check_configuration(self, configuration: Configuration) -> None:
        """Raise ValueError for a configuration that it does not run."""
        self.check_layout(configuration.layout)
        pp, vp, count = configuration.layout.pp, configuration.layout.vp, configuration.num_microbatches
        if vp > 1 and count % pp:  # 2104.04473, section 2.2.2
            raise ValueError(
                f"global_batch({configuration.global_batch}) makes {count} micro-batches of micro_batch"
                f"({configuration.micro_batch}), and an interleaved pipeline (vp({vp})) needs a multiple of pp({pp})"
            )

    def check_model_in(self, layout: Layout, model: ModelShape) -> None:
        """Raise ValueError for a layout that it runs, but not with this model. The default has none."""

    def check_precision(self, layout: Layout, precision: str) -> None:
        """Raise ValueError for a layout that it runs, but not in this precision. The default has none."""

    def check_optimizer_in(self, layout: Layout) -> None:
        """Raise ValueError for a layout that it runs, but not with the job's optimizer. The default has none."""

    def runs(self, configuration: Configuration, precision: str) -> bool:
        """Whether `check_configuration`, `check_precision` and `check_optimizer_in` pass."""
        try:
            self.check_configuration(configuration)
            self.check_precision(configuration.layout, precision)
            self.check_optimizer_in(configuration.layout)
        except ValueError:
            return False
        return True

    def parts(self, configuration: Configuration) -> dict[str, PartCount]:
        """The parts that a step of this configuration has, by noise source; sources that the backend cannot measure in
        it are left out.

        By default every replica sees the gradients of its own micro-batches before they are reduced: dp × micro-batches
        parts. A backend that reduces every micro-batch over the replicas, or one whose replicas share a micro-batch,
        has fewer and larger parts and overrides this.
        """
        dp, count = configuration.layout.dp, configuration.num_microbatches
        return {
            MICROBATCH: PartCount(dp * count, configuration.micro_batch),
            REPLICA: PartCount(dp, configuration.global_batch // dp),
            NORMLAYER: PartCount(configuration.global_batch, 1),
        }

    def implementation(self, dropout: bool) -> "Implementation":
        """How it uses memory."""
        from profiles.memory.implementation import Implementation  # its package loads numpy, which few commands need

        return Implementation(dropout=dropout)


ANY_BACKEND = BackendTraits()
"""A backend without limits of its own."""
