"""The adapter of a sharded model as one PEFT file, made on the first rank as it arrives.

The file's layout, its checks and the bytes themselves are those of :mod:`ckpt.consolidate`; here is
only the source that it reads: tensors that come over the group, in the order of the file. So the
bytes do not depend on the number of ranks, and the first rank holds one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from archon_lora.adapter import applied_lora, get_adapter_params
from archon_lora.errors import AdapterMismatch, LoRANotEnabled, NoAdapterError
from archon_lora.names import DEFAULT_ADAPTER
from archon_lora.peft import peft_export
from ckpt.adapter_plan import plan_adapter
from ckpt.consolidate import stream_adapter
from ckpt.dtypes import dtype_code
from ckpt.expert_form import file_key
from ckpt.peft import WeightsFile
from ckpt.types import (
    MODEL_PREFIX,
    AdapterExport,
    Chunk,
    ExpertForm,
    TensorRecord,
    TensorRule,
)

from .agree import attempt, deadline_of, gather_json, rank_of
from .gather import Gather, Whole, dtype_name, tensor_bytes
from .types import EngineLike

HOW_TO_ENABLE = "set use_lora=true (EngineConfig(lora=LoRAConfig(...)))"


def require_lora(engine: EngineLike, doing: str) -> None:
    """Refuse to go on where LoRA is off.

    Raises:
        LoRANotEnabled: names the setting to change.
    """
    if engine.lora_config is None:
        msg = f"LoRA is not enabled on this engine: {HOW_TO_ENABLE} before {doing}"
        raise LoRANotEnabled(msg)


class AdapterStream:
    """One save or hand-over of an adapter; every rank makes one and ends with :meth:`finish`.

    Args:
        engine: the engine, whose LoRA is on.
        base_model_name: ``base_model_name_or_path`` of the PEFT configuration.
        normalise: the serving form instead of the training form.
        experts: form of the adapters on experts.
        adapter: which one.

    Attributes:
        peft_config: content of ``adapter_config.json``.

    Raises:
        LoRANotEnabled: no LoRA in the model.
        NoAdapterError: no rank holds an adapter parameter, or there is no adapter of that name.
        AdapterMismatch: ranks disagree about the adapter.
        StateError: the export does not fit the tensors.
        ConfigError: experts that cannot be stacked.
    """

    def __init__(
        self,
        engine: EngineLike,
        *,
        base_model_name: str,
        normalise: bool,
        experts: ExpertForm = "single",
        adapter: str = DEFAULT_ADAPTER,
    ) -> None:
        group, timeout = engine.cpu_group, deadline_of(engine)
        held: dict[str, Tensor] = {}
        mine: list[dict[str, Any]] = []
        with attempt(group, what="collecting the adapter", timeout=timeout):
            for part in _adapted_parts(engine.model_parts):
                export = peft_export(
                    part,
                    normalise=normalise,
                    base_model_name=base_model_name,
                    experts=experts,
                    adapter=adapter,
                )
                params = get_adapter_params(part, frozen=True)
                # A pipeline stage exports the whole adapter and holds a part of it.
                sources = {rule["source"] for rule in export["rules"]} & params.keys()
                held.update({source: params[source] for source in sources})
                mine.append({**export, "modules": applied_lora(part, adapter).target_names()})
        exports = [e for rank in gather_json(group, mine, timeout=timeout) for e in rank]
        rules = {rule["key"]: TensorRule(**rule) for e in exports for rule in e["rules"]}
        if not rules:
            kinds = ", ".join(type(part).__name__ for part in engine.model_parts) or "no model"
            msg = (
                f"LoRA is configured, but {kinds} has no adapter parameters, so there is nothing "
                "to save; check target_modules and that apply_lora() ran before sharding"
            )
            raise NoAdapterError(msg)
        merged = _merge_configs(exports)
        self._export = AdapterExport(merged, tuple(rules.values()), experts=experts)
        self._group: dist.ProcessGroup | None = group
        names = _arrivals(self._export)
        self._gather = Gather(
            {names[source]: tensor for source, tensor in held.items()}, group, timeout=timeout
        )
        self._dtype = _common_dtype(self._gather.catalogue)
        records = _records(self._gather, self._export)
        with attempt(group, what="laying out the adapter", timeout=timeout):
            self._plan = plan_adapter(self._export, records, self._dtype)
        self.peft_config: dict[str, Any] = dict(self._plan.peft_config)

    @property
    def is_writer(self) -> bool:
        """Whether this is the rank that gets the tensors."""
        return rank_of(self._group) == 0

    def weights(self) -> WeightsFile:
        """The weights file, whose bytes arrive while it is read; on the writer, once.

        Raises:
            NonFiniteError: while reading; a value is NaN or infinite.
        """
        source = _Arriving(self._gather, self._export)
        return WeightsFile(self._plan.size, stream_adapter(self._plan, source))

    def finish(self) -> None:
        """Send, or drop, what was not asked for, so that no rank is left waiting."""
        self._gather.drain()


def _arrivals(export: AdapterExport) -> dict[str, str]:
    """A name for every source, such that sources arrive in the order in which they are needed.

    A gather goes by the names, and the file by its keys: a source's name begins with the first key
    that is made from it. Of stacked experts, many are.
    """
    first: dict[str, str] = {}
    for rule in export.rules:
        key = file_key(export, rule.key)
        first[rule.source] = min(key, first.get(rule.source, key))
    return {source: f"{key} {source}" for source, key in first.items()}


def _records(gather: Gather, export: AdapterExport) -> dict[str, TensorRecord]:
    """What the gather will bring, each source a file by itself under its arrival name."""
    return {
        f"{MODEL_PREFIX}{source}": _record(source, name, gather.catalogue[name])
        for source, name in _arrivals(export).items()
    }


class _Arriving:
    """A :class:`ckpt.source.TensorSource` over a gather: a "file" is a source by its arrival name.

    A source stays until the last key that is made from it: one tensor at a time, and of stacked
    experts those of one layer.
    """

    def __init__(self, gather: Gather, export: AdapterExport) -> None:
        self.records: Mapping[str, TensorRecord] = _records(gather, export)
        self._tensors = iter(gather)
        self._here: dict[str, memoryview] = {}
        names = _arrivals(export)
        self._last: dict[str, str] = {}
        for rule in export.rules:
            key, name = file_key(export, rule.key), names[rule.source]
            self._last[name] = max(key, self._last.get(name, key))

    def read(self, file: str, start: int, end: int) -> memoryview:
        """Bytes of a tensor; tensors must first be asked for in the order of their names."""
        if file not in self._here:
            key = file.partition(" ")[0]
            self._here = {n: data for n, data in self._here.items() if self._last[n] >= key}
            name, tensor = next(self._tensors, (None, None))
            if name != file or tensor is None:
                msg = f"{file} does not arrive in the order in which it is asked for"
                raise AdapterMismatch(msg)
            self._here[file] = tensor_bytes(tensor)
        return self._here[file][start:end]


def _record(source: str, file: str, whole: Whole) -> TensorRecord:
    size = whole.dtype.itemsize
    for extent in whole.shape:
        size *= extent
    chunk = Chunk((0,) * len(whole.shape), whole.shape, file, 0, size)
    return TensorRecord(f"{MODEL_PREFIX}{source}", dtype_code(whole.dtype), whole.shape, (chunk,))


def _adapted_parts(parts: list[nn.Module]) -> list[nn.Module]:
    """Parts with adapter parameters; a pipeline stage may have none."""
    return [part for part in parts if get_adapter_params(part)]


def _merge_configs(exports: list[dict[str, Any]]) -> dict[str, Any]:
    """One configuration for all stages.

    Stages may need different target names. Whole module names, which match themselves alone, then
    take their place.

    Raises:
        AdapterMismatch: stages differ in something else.
    """
    first = dict(exports[0]["peft_config"])
    for export in exports[1:]:
        other = {**export["peft_config"], "target_modules": first["target_modules"]}
        if other != first:
            wrong = sorted(k for k in first.keys() | other.keys() if first.get(k) != other.get(k))
            msg = f"model parts have adapters of different settings: {', '.join(wrong)}"
            raise AdapterMismatch(msg)
    if any(e["peft_config"] != first for e in exports):
        first["target_modules"] = sorted({name for e in exports for name in e["modules"]})
    return first


def _common_dtype(catalogue: Mapping[str, Whole]) -> str:
    dtypes = sorted({dtype_name(whole.dtype) for whole in catalogue.values()})
    if len(dtypes) != 1:
        msg = f"the adapter's parameters have several dtypes ({', '.join(dtypes)}); want one"
        raise AdapterMismatch(msg)
    return dtypes[0]
