"""Model FLOP utilization: the operations that a model asks for, over what its accelerators could do in the time."""

from profiles.accelerator import accelerator, is_described
from profiles.cluster import Cluster
from profiles.model_shape import ModelShape


def flops_per_token(model: ModelShape) -> float:
    """Floating point operations that training on a token takes, forward and backward, recomputation not counted.

    6 for every weight that it is multiplied with (not the embedding, which is looked up; of the experts those that it
    is sent to), and 12 for every score · head width of attention, which are as many as a token attends to on average:
    PaLM (2204.02311, appendix B), but with the causal mask, and with windows where layers have them.
    """
    weights = model.matrices(model.experts_per_token) + model.vocab * model.hidden
    window, whole = min(model.sliding_window or model.seq_len, model.seq_len), model.full_attention_layers
    attended = whole * model.seq_len / 2 + (model.layers - whole) * window * (1 - window / (2 * model.seq_len))
    return 6.0 * weights + 12.0 * model.attention_width * attended


def peak_samples_per_second(model: ModelShape, cluster: Cluster, precision: str) -> float | None:
    """Sequences a second at the accelerators' rated peak: a throughput over this is the MFU.

    None if no data sheet says the peak: an accelerator without a file, one that lacks the precision, a CPU core.
    """
    device = accelerator(cluster.accelerator) if is_described(cluster.accelerator) else None
    if device is None or not device.rated or precision not in device.flops:
        return None
    return cluster.accelerators * device.flops[precision] / (flops_per_token(model) * model.seq_len)
