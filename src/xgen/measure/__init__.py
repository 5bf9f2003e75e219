"""Loss on held-out text: strided, by position and with fixed targets, with intervals over documents.

Pure numpy over a `Score` callable; docs/reference/measurements.md defines every figure.
"""

from xgen.measure.intervals import Interval, difference_interval, mean_interval
from xgen.measure.losses import Score, StridedSums, Sums, fixed_target_loss, loss_by_position, strided_loss
from xgen.measure.sampling import sample
from xgen.measure.stages import Measurements, forward_tokens, measure_checkpoints
from xgen.measure.text import HeldOut, Sample, sample_documents, xz_bits_per_byte
from xgen.measure.windows import position_bins, rows_per_batch

__all__ = [
    "HeldOut",
    "Interval",
    "Measurements",
    "Sample",
    "Score",
    "StridedSums",
    "Sums",
    "difference_interval",
    "fixed_target_loss",
    "forward_tokens",
    "loss_by_position",
    "mean_interval",
    "measure_checkpoints",
    "position_bins",
    "rows_per_batch",
    "sample",
    "sample_documents",
    "strided_loss",
    "xz_bits_per_byte",
]
