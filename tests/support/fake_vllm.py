"""vLLM's resolver interface as 0.32 has it, and how its server uses a resolver."""

from __future__ import annotations

import abc
import asyncio
import sys
import types
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class LoRARequest:
    """The fields and checks of ``vllm.lora.request.LoRARequest``."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"


class LoRAResolver(abc.ABC):
    @abc.abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


@dataclass
class Registry:
    resolvers: dict[str, LoRAResolver] = field(default_factory=dict)

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        assert isinstance(resolver, LoRAResolver)
        self.resolvers[resolver_name] = resolver


class Server:
    """What an OpenAI server of vLLM does with the name of a model that it does not know."""

    def __init__(self, registry: Registry, model: str) -> None:
        self.registry, self.model = registry, model
        self.loaded: dict[str, LoRARequest] = {}
        self._count = 0
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def resolve(self, name: str) -> LoRARequest | int:
        """The request that is loaded, or the HTTP status of the refusal."""
        async with self._locks[name]:
            if name in self.loaded:
                return self.loaded[name]
            self._count += 1
            for resolver in self.registry.resolvers.values():
                try:
                    request = await resolver.resolve_lora(self.model, name)
                except Exception:
                    return 500
                if request is not None:
                    request.lora_int_id = self._count
                    self.loaded[name] = request
                    return request
            return 404


def install(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Make ``import vllm`` find this; the registry that plug-ins register with."""
    registry = Registry()
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry},
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return registry
