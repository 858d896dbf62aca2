"""The tree of errors; each one keeps a standard-library parent.

::

    ArchonLoraError
    ├── LoRAConfigError      (ValueError)        a setting: what was given, what is wanted
    ├── TargetError          (ValueError)        a target entry that matches nothing
    ├── LoRANotEnabled       (RuntimeError)      an adapter operation on an engine without LoRA
    ├── NoAdapterError       (RuntimeError)      LoRA is on, but there are no adapter parameters
    ├── AdapterModeError     (RuntimeError)      switching between adapters out of order
    ├── AdapterMismatch      (ValueError)        keys missing, unexpected, or of the wrong shape
    ├── AdapterNotFound      (FileNotFoundError) no adapter file at the path
    ├── MergeError           (RuntimeError)      a base into which nothing can be merged
    ├── UnmappedName         (KeyError)          a tensor that no name map covers
    ├── ModelLoadError       (ValueError)        a model directory that cannot be loaded
    ├── PeerFailed           (RuntimeError)      another rank failed, so this one stops too
    ├── TrainConfigError     (ValueError)        a setting of a training run
    ├── ParallelConfigError  (ValueError)        a layout that ranks, model or adapter do not fit
    ├── EngineNotReady       (RuntimeError)      a call that the engine's state does not allow
    └── NonFiniteGradient    (ArithmeticError)   NaN or infinity in the gradients
"""

from __future__ import annotations


class ArchonLoraError(Exception):
    """Root of every error that this package raises on purpose."""


class LoRAConfigError(ArchonLoraError, ValueError):
    """A setting that cannot work; says what was given and what is wanted."""


class TargetError(ArchonLoraError, ValueError):
    """A target entry matched no module, or a module that cannot take an adapter."""


class LoRANotEnabled(ArchonLoraError, RuntimeError):
    """An adapter operation was asked of an engine or model that has no LoRA."""


class NoAdapterError(ArchonLoraError, RuntimeError):
    """LoRA is configured, but the model holds no adapter parameters."""


class AdapterModeError(ArchonLoraError, RuntimeError):
    """Blocks of ``adapter_mode()`` left out of order, or a switch that a block would undo."""


class AdapterMismatch(ArchonLoraError, ValueError):
    """The adapter's keys or shapes are not those of the model."""


class MergeError(ArchonLoraError, RuntimeError):
    """The base has no ordinary weight that an update could be added to."""


class AdapterNotFound(ArchonLoraError, FileNotFoundError):
    """No adapter file lies at the path."""


class UnmappedName(ArchonLoraError, KeyError):
    """A tensor's name is in no map; it is refused, never dropped."""

    def __str__(self) -> str:
        """The message as written (``KeyError`` would show its repr)."""
        return str(self.args[0]) if self.args else ""


class ModelLoadError(ArchonLoraError, ValueError):
    """A model directory lacks a file or holds values that cannot be used."""


class PeerFailed(ArchonLoraError, RuntimeError):
    """Another rank failed, so this one stops too; says which rank, and why."""


class TrainConfigError(ArchonLoraError, ValueError):
    """A setting of a training run; names the key, what was given and what is wanted."""


class ParallelConfigError(ArchonLoraError, ValueError):
    """A layout over ranks that does not fit their number, the model or the adapter."""


class EngineNotReady(ArchonLoraError, RuntimeError):
    """The engine is not initialised, initialised twice, or was built without an optimizer."""


class NonFiniteGradient(ArchonLoraError, ArithmeticError):
    """The gradient norm is NaN or infinite; nothing was updated."""
