"""The line that rank 0 prints for each step: `copus logs` shows it."""

from copus.events import Evaluate, Event, Reconfigure, Start, Step
from profiles.configuration import Configuration
from profiles.formatting import duration, percent, three_digits


class StepLines:
    """Turns events into lines; keeps the configuration that runs."""

    def __init__(self) -> None:
        self._configuration: Configuration | None = None
        self._start: Start | None = None

    def line(self, event: Event) -> str | None:
        """The line of an event; None for those that get none."""
        if isinstance(event, Start):
            self._start, self._configuration = event, event.configuration
            gbit = event.network_gbit_per_second
            network = "" if gbit is None else f", {gbit:.3g} Gbit/s between nodes"
            return f"step {event.step}: training begins in {event.configuration.label}{network}"
        if isinstance(event, Reconfigure):
            self._configuration = event.after
            verb = "tries" if event.trial else "moves to"
            return f"step {event.step}: {verb} {event.after.label}, {duration(event.seconds)}"
        if isinstance(event, Evaluate):
            loss = "not finite" if event.loss is None else f"{event.loss:.4f}"
            return f"step {event.step}: validation loss {loss}"
        return self._step(event) if isinstance(event, Step) else None

    def _step(self, event: Step) -> str:
        loss = "not finite" if event.loss is None else f"{event.loss:.4f}"
        norm = "not finite" if event.grad_norm is None else f"{event.grad_norm:.3g}"
        parts = [f"step {event.step}: loss {loss}", f"gradient norm {norm}", f"lr {event.lr:.2e}"]
        if event.expert_imbalance is not None:
            parts.append(f"busiest expert {event.expert_imbalance:.2f} of the mean")
        if event.dropped_share:
            parts.append(f"{percent(event.dropped_share)} of the tokens' experts dropped")
        if self._start is not None and event.seconds > 0:
            rate = event.global_batch / event.seconds
            parts.append(f"{three_digits(rate * self._start.seq_len)} tokens/s")
            if self._start.peak_samples_per_second:
                parts.append(f"MFU {percent(rate / self._start.peak_samples_per_second)}")
        if self._configuration is not None:
            layout, micro_batch = self._configuration.layout.label, self._configuration.micro_batch
            parts.append(f"batch {event.global_batch} in {layout} m{micro_batch}")
        parts.append(duration(event.seconds))
        return ", ".join(parts) + ", skipped" * event.skipped
