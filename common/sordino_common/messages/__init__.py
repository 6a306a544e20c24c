"""Commands and events: frozen typed values, a closed registry, one strict CBOR codec."""

from sordino_common.messages.array import Array
from sordino_common.messages.base import Message, decode_message, encode_message, message_types
from sordino_common.messages.codec import DEFAULT_LIMITS, Limits, decode, encode
from sordino_common.messages.fleet import (
    ColumnInfo,
    DatasetInfo,
    Describe,
    Described,
    Health,
    HealthReport,
    PlanPut,
    PlanReady,
    Refused,
)
from sordino_common.messages.jobs import (
    Cancel,
    DataRef,
    Evaluate,
    Evaluated,
    Moments,
    MomentsResult,
    Train,
    Trained,
)
from sordino_common.messages.store import (
    TensorDrop,
    TensorDropped,
    TensorGet,
    TensorPut,
    TensorRun,
    TensorStored,
    TensorValue,
)

__all__ = [
    "DEFAULT_LIMITS",
    "Array",
    "Cancel",
    "ColumnInfo",
    "DataRef",
    "DatasetInfo",
    "Describe",
    "Described",
    "Evaluate",
    "Evaluated",
    "Health",
    "HealthReport",
    "Limits",
    "Message",
    "Moments",
    "MomentsResult",
    "PlanPut",
    "PlanReady",
    "Refused",
    "TensorDrop",
    "TensorDropped",
    "TensorGet",
    "TensorPut",
    "TensorRun",
    "TensorStored",
    "TensorValue",
    "Train",
    "Trained",
    "decode",
    "decode_message",
    "encode",
    "encode_message",
    "message_types",
]
