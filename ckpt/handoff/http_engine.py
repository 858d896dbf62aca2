"""What the drivers of both engines share: a replica, and OpenAI's list of models."""

from __future__ import annotations

from typing import Any

from .replica import DEFAULT_TIMEOUT_S, Replica


class HttpEngine:
    """One server, with what vLLM and SGLang have in common.

    Args:
        url: its address, ``http://host:port``.
        api_key: what it was started with as ``--api-key``, if it was.
        base_model: the name under which it serves the base, if it is to be another one than the
            first on its list; SGLang needs none.
        timeout_s: how long one answer may take, a load's too.

    Raises:
        ConfigError: an address or a time that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        base_model: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._replica = Replica(url, api_key=api_key, timeout_s=timeout_s)
        self._base_model = base_model

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @property
    def url(self) -> str:
        """See :class:`~ckpt.handoff.engine.Engine`."""
        return self._replica.url

    def ready(self, timeout_s: float) -> None:
        """See :class:`~ckpt.handoff.engine.Engine`."""
        self._replica.wait_until("/health", timeout_s)

    def adapters(self) -> dict[str, str | None]:
        """See :class:`~ckpt.handoff.engine.Engine`."""
        return {card["id"]: card.get("root") for card in self._cards() if card.get("parent")}

    def close(self) -> None:
        """See :class:`~ckpt.handoff.engine.Engine`."""
        self._replica.close()

    def _cards(self) -> list[dict[str, Any]]:
        what = "list its models"
        answer = self._replica.read("/v1/models", what)
        return self._replica.expect("/v1/models", what, _model_cards, answer)


def _model_cards(answer: Any) -> list[dict[str, Any]]:
    """The entries of an OpenAI-style list of models, each with an ``id``.

    Raises:
        KeyError, TypeError: it is no such list.
    """
    cards = list(answer["data"])
    for card in cards:
        if not isinstance(card["id"], str) or not isinstance(card.get("root"), str | None):
            raise TypeError(card)
    return cards
