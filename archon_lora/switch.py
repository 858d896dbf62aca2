"""The state by which a module knows what its forward uses: one adapter, or its base alone."""

from __future__ import annotations

from .names import DEFAULT_ADAPTER


class AdapterSwitch:
    """Enabling, disabling and choosing adapters; to be put before ``nn.Module`` among the bases.

    Follows :class:`archon_lora.protocol.NamedAdapters`. A forward looks at ``_alone`` first: one
    test, whatever led to it. Whoever adds or removes an adapter calls :meth:`_settle`.

    It is no abstract base class: ``fully_shard()`` gives a module another class in place, which
    Python allows only if the first base lies directly on ``object``.
    """

    # On the class, so that no constructor is needed: modules are also made in other ways.
    _disabled = False
    _active = DEFAULT_ADAPTER
    _alone = False

    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that have parameters here, the default one first."""
        raise NotImplementedError

    @property
    def disabled(self) -> bool:
        """Whether forward computes the base alone, whatever adapter is active."""
        return self._disabled

    @property
    def active(self) -> str:
        """The adapter that forward uses unless disabled; the base alone if it is not here."""
        return self._active

    def enable(self) -> None:
        """Let forward add the active adapter's update."""
        self._disabled = False
        self._settle()

    def disable(self) -> None:
        """Let forward compute the base alone."""
        self._disabled = True
        self._settle()

    def activate(self, name: str) -> None:
        """Let forward use this adapter, or the base alone if it is not here; does not enable."""
        self._active = name
        self._settle()

    def _settle(self) -> None:
        self._alone = self._disabled or self._active not in self.adapter_names()

    def _switched(self) -> str:
        """What ``extra_repr()`` says of it: nothing in the usual state."""
        state = ", disabled" if self._disabled else ""
        return state if self._active == DEFAULT_ADAPTER else f"{state}, active={self._active!r}"
