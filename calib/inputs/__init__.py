"""What a model is calibrated on: documents in three parts that share none, as rows of tokens."""

from k2quant.calib.inputs.reading import read_samples
from k2quant.calib.inputs.samples import PARTS, Batch, Part, Samples

__all__ = ["PARTS", "Batch", "Part", "Samples", "read_samples"]
