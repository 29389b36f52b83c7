"""Frozen records that layers pass to each other.

Tensor shapes: N pairs or examples, T tokens of a packed stream, S scored tokens (the tokens of all responses).
Importing this package does not import torch.
"""

from qpref.records.batches import Group, PackedBatch, TokenizedExample
from qpref.records.losses import (
    EXTRAS,
    ListInputs,
    LossOutput,
    MetricRow,
    PairedInputs,
    PairLogProbs,
    TokenLogProbs,
    UnpairedInputs,
)
from qpref.records.responses import SampledResponse
from qpref.records.rows import Finding, Message, PreferencePair, RankedList, Row, Source, Spans, UnpairedExample

__all__ = [
    "Source",
    "Row",
    "Finding",
    "Message",
    "PreferencePair",
    "RankedList",
    "UnpairedExample",
    "TokenizedExample",
    "Group",
    "PackedBatch",
    "TokenLogProbs",
    "PairLogProbs",
    "PairedInputs",
    "UnpairedInputs",
    "ListInputs",
    "LossOutput",
    "MetricRow",
    "SampledResponse",
    "Spans",
    "EXTRAS",
]
