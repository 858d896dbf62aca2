"""The tree of errors.

Every error names what was found, what was wanted and what to do, and keeps a
standard-library parent so that callers can catch it without importing us::

    CkptError
    ├── ConfigError            (ValueError)         a setting that cannot work
    │   └── NotExportable                           an adapter that no engine would load
    ├── StorageError           (OSError)            the store failed
    │   ├── ObjectNotFound     (FileNotFoundError)
    │   ├── AlreadyExists      (FileExistsError)    exclusive create lost
    │   ├── StoreNotExclusive                       the store cannot fence writers
    │   └── ReadOnly                                a root behind a service is only read
    ├── DamagedError           (ValueError)         bytes that do not verify
    ├── StateError             (ValueError)         checkpoint and live state disagree
    │   └── BaseMismatch                            another base model
    ├── NonFiniteError         (ValueError)         NaN or infinity where none may be
    ├── PlanError              (ValueError)         ranks disagree about the layout
    ├── NoCheckpoint           (FileNotFoundError)  nothing to restore or export
    ├── StepExists             (FileExistsError)    this step is already committed
    ├── UnrestoredRoot         (RuntimeError)       saving over a run that was not restored
    ├── Superseded             (RuntimeError)       a newer writer owns the root
    ├── SaveAborted            (RuntimeError)       a rank failed; nothing was committed
    │   └── VoteTimeout        (TimeoutError)       a rank did not answer in time
    ├── CommitUnknown          (RuntimeError)       the manifest's fate could not be read back
    ├── PublishError           (RuntimeError)       the version failed; the step is not affected
    ├── HandoffTimeout         (TimeoutError)       no newer version, or no answer, in time
    ├── CacheFull              (RuntimeError)       what is in use leaves a cache no room
    │   └── TooLargeForCache                        one version alone is above the bound
    ├── handoff.engine.EngineError (RuntimeError)   a replica did not do what it was asked
    │   ├── EngineUnreachable                       no answer; it may have been done
    │   └── AdapterRefused                          it will not take this adapter
    ├── handoff.engine.ProofError  (RuntimeError)   its answers are not the version's
    └── handoff.report.HandoverFailed (RuntimeError)  a version is not live; the old one is
"""

from __future__ import annotations


class CkptError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(CkptError, ValueError):
    """A setting or argument that cannot work."""


class NotExportable(ConfigError):
    """The adapter can be saved and resumed, but is more than engines and exports know."""


class StorageError(CkptError, OSError):
    """The store failed; the message names the path and never a credential."""


class ObjectNotFound(StorageError, FileNotFoundError):
    """The path names nothing."""


class AlreadyExists(StorageError, FileExistsError):
    """An exclusive create found the name taken."""


class StoreNotExclusive(StorageError):
    """The store ignores conditional writes, so it cannot keep two writers apart."""


class ReadOnly(StorageError):
    """A root behind a service is only read; what changes it runs where the root is."""


class DamagedError(CkptError, ValueError):
    """A manifest, header or file whose bytes do not verify."""


class StateError(CkptError, ValueError):
    """The checkpoint and the live state disagree on names, shapes or dtypes."""


class BaseMismatch(StateError):
    """The checkpoint was trained over a different base model."""


class NonFiniteError(CkptError, ValueError):
    """A tensor holds NaN or infinity where a reader would take it as a weight."""


class PlanError(CkptError, ValueError):
    """Ranks disagree about what is to be saved."""


class NoCheckpoint(CkptError, FileNotFoundError):
    """No committed step or version answers the request."""


class StepExists(CkptError, FileExistsError):
    """The step is already committed by this writer; committed steps are immutable."""


class UnrestoredRoot(CkptError, RuntimeError):
    """The root holds steps, but this manager neither restored nor said ``fresh=True``."""


class Superseded(CkptError, RuntimeError):
    """A newer writer has claimed the root; this one may not commit any more."""


class SaveAborted(CkptError, RuntimeError):
    """A rank failed or the vote did not pass; no step was committed."""


class VoteTimeout(SaveAborted, TimeoutError):
    """A rank did not answer before the deadline."""


class CommitUnknown(CkptError, RuntimeError):
    """The manifest was sent but its fate could not be read back; restore will settle it."""


class PublishError(CkptError, RuntimeError):
    """A version could not be published; the resumable step is not affected."""


class HandoffTimeout(CkptError, TimeoutError):
    """What a reader or an engine waited for did not come before the deadline."""


class CacheFull(CkptError, RuntimeError):
    """A node's cache has no room for a version beside those that may not be deleted."""


class TooLargeForCache(CacheFull):
    """A version alone is larger than a cache's bound, so that waiting would not help."""
