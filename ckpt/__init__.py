"""Asynchronous, sharded, verified checkpoints for LoRA training on torch.distributed.

>>> import torch
>>> from ckpt import CheckpointManager, TrainState
>>> model = torch.nn.Linear(4, 2)
>>> state = TrainState(model, torch.optim.AdamW(model.parameters()))
>>> with CheckpointManager("runs/7") as manager:
...     start = manager.restore(state)      # the newest valid step, or None
...     handle = manager.save(0, state)     # returns after one copy
>>> handle.committed.done()
True
"""

from .about import package_version
from .errors import (
    AlreadyExists,
    BaseMismatch,
    CkptError,
    CommitUnknown,
    ConfigError,
    DamagedError,
    NoCheckpoint,
    NonFiniteError,
    ObjectNotFound,
    PlanError,
    PublishError,
    SaveAborted,
    StateError,
    StepExists,
    StorageError,
    StoreNotExclusive,
    Superseded,
    UnrestoredRoot,
    VoteTimeout,
)
from .handle import SaveHandle
from .manager import CheckpointManager
from .peft_model import export_of_peft
from .restore import DamagedStep, RestoreReport
from .state_parts import ALL_PARTS, Part
from .takeover import WarmStart, warm_start
from .tensorboard import TensorBoardReporter
from .train_state import TrainState
from .types import AdapterExport, BaseIdentity, Retention, SaveMetrics, TensorRule

__version__ = package_version()

__all__ = [
    "ALL_PARTS",
    "AdapterExport",
    "AlreadyExists",
    "BaseIdentity",
    "BaseMismatch",
    "CheckpointManager",
    "CkptError",
    "CommitUnknown",
    "ConfigError",
    "DamagedError",
    "DamagedStep",
    "NoCheckpoint",
    "NonFiniteError",
    "ObjectNotFound",
    "Part",
    "PlanError",
    "PublishError",
    "RestoreReport",
    "Retention",
    "SaveAborted",
    "SaveHandle",
    "SaveMetrics",
    "StateError",
    "StepExists",
    "StorageError",
    "StoreNotExclusive",
    "Superseded",
    "TensorBoardReporter",
    "TensorRule",
    "TrainState",
    "UnrestoredRoot",
    "VoteTimeout",
    "WarmStart",
    "export_of_peft",
    "warm_start",
]
