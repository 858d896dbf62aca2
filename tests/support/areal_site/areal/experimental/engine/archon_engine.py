"""A stand-in for AReaL's Archon engine: its attributes, its hooks and the order of its calls.

The model is this project's decoder, whose names are Archon's; the rest is as small as can be.
"""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from archon_lora.models import get_model_spec
from archon_lora.models.hf_files import read_config
from areal.api import ParallelStrategy
from areal.experimental.engine.archon_checkpoint import load_model_from_hf, save_model_to_hf
from areal.experimental.models.archon import small


def _spec(model_type: str) -> Any:
    if model_type != "small":
        return get_model_spec(model_type)
    return SimpleNamespace(
        config_cls=small.SmallArgs,
        model_cls=small.Small,
        parallelize_fn=small.parallelize_small,
    )


class StateDictAdapter:
    """Maps what it knows and drops the rest, without a word."""

    def __init__(self, table: dict[str, str]) -> None:
        self.to_hf_map = table
        self.from_hf_map = {hf: ours for ours, hf in table.items()}
        self.fqn_to_index_mapping = None

    def _maybe_composite_hf_key(self, hf_key: str) -> str:
        return hf_key

    def to_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return {hf: t for n, t in state.items() if (hf := _mapped(n, self.to_hf_map))}

    def from_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return {n: t for hf, t in state.items() if (n := _mapped(hf, self.from_hf_map))}

    def convert_single_to_hf(self, name: str, tensor: Any) -> list[tuple[str, Any]]:
        hf = _mapped(name, self.to_hf_map)
        return [(hf, tensor)] if hf else []


def _mapped(name: str, table: dict[str, str]) -> str | None:
    number = re.search(r"layers\.(\d+)\.", name)
    found = table.get(re.sub(r"layers\.\d+\.", "layers.{}.", name))
    return found.replace("{}", number[1]) if found and number else found


class ArchonEngine:
    """The hooks of AReaL's, called in AReaL's order."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.model_config = read_config(Path(config.path))
        self.spec = _spec(self.model_config["model_type"])
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.lr_scheduler: Any
        self.state_dict_adapter: Any = None
        self.model_parts: list[nn.Module] = []
        self.rollout_engine: Any = None
        self.rollout_coordinator: Any = None
        self.pp_has_last_stage = True
        self._version = 0
        self.is_offload = False
        self.calls: list[str] = []

    def create_process_group(self, parallel_strategy: Any = None) -> None:
        self._cpu_group = dist.new_group(backend="gloo")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        asked = parallel_strategy or ParallelStrategy()
        self.parallel_dims = SimpleNamespace(
            tp=asked.tensor_parallel_size,
            pp=asked.pipeline_parallel_size,
            pp_enabled=asked.pipeline_parallel_size > 1,
        )
        pp, tp = self.parallel_dims.pp, self.parallel_dims.tp
        shape = (pp, self.world_size // (pp * tp), tp)
        self._world_mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp", "tp"))

    @property
    def cpu_group(self) -> dist.ProcessGroup:
        return self._cpu_group

    def initialize(self, addr: str | None, ft_spec: Any) -> None:
        assert addr is None
        self._create_device_model()
        self.state_dict_adapter = self._create_state_dict_adapter()
        self._setup_parallelism(None, False)
        dist.barrier(group=self.cpu_group)
        self._materialize_and_load_weights()
        self._create_optimizer(ft_spec)

    def _create_device_model(self) -> None:
        self._args = self.spec.config_cls.from_hf(self.model_config)
        with torch.device("meta"):
            model = self.spec.model_cls(self._args)
        self.model = model.to(getattr(torch, self.config.dtype))

    def _create_state_dict_adapter(self) -> Any:
        if isinstance(self._args, small.SmallArgs):
            return StateDictAdapter(small.TABLE)
        ours = self.spec.state_dict_adapter_cls(self._args)
        table = {n: hf for n, hf in ours.to_hf_map.items() if "lora_" not in n}
        return StateDictAdapter(table)

    def _setup_parallelism(self, ac_config: Any, enable_compile: bool) -> None:
        self.model_parts = [self.model]
        if self.parallel_dims.pp_enabled:
            self.model_parts = [self._stage()]
            del self.model
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for model in self.model_parts:
            if self.parallel_dims.tp > 1:
                self.spec.parallelize_fn(model, self._world_mesh["tp"])
            for layer in model.layers.values():
                fully_shard(layer, mesh=self._world_mesh["dp"], mp_policy=policy)
            fully_shard(model, mesh=self._world_mesh["dp"], mp_policy=policy)

    def _stage(self) -> nn.Module:
        """A copy of the model without the layers of other stages."""
        stage = copy.deepcopy(self.model)
        number, stages = self._world_mesh["pp"].get_local_rank(), self.parallel_dims.pp
        names = list(stage.layers)
        each = len(names) // stages
        for name in names:
            if name not in names[number * each : (number + 1) * each]:
                del stage.layers[name]
        return stage

    def _materialize_and_load_weights(self) -> None:
        for model in self.model_parts:
            model.to_empty(device="cpu")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))  # whatever the memory held
        load_model_from_hf(self, self.config.path)
        dist.barrier(group=self.cpu_group)

    def _create_optimizer(self, ft_spec: Any) -> None:
        self.optimizer = torch.optim.AdamW(self._get_all_parameters(), lr=self.config.optimizer.lr)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1.0 - step / (2 * ft_spec.total_train_steps)
        )

    def _get_all_parameters(self) -> list[nn.Parameter]:
        return [p for m in self.model_parts for p in m.parameters()]

    def train_batch(self, input_: dict[str, Any], loss_fn: Any, loss_weight_fn: Any) -> Any:
        """One update, with AReaL's gradient clipping over all that the optimizer is asked about."""
        ids = input_["input_ids"]
        logits = self.model(ids).float()
        labels = torch.roll(ids, -1, dims=-1)
        logprobs = torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
        assert loss_weight_fn(input_) > 0
        extremes = {"vocab_min_logits": logits.min(-1)[0], "vocab_max_logits": logits.max(-1)[0]}
        loss_fn(logprobs, entropy, input_, **extremes).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._get_all_parameters(), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return {"grad_norm": float(norm), "update_successful": 1.0}

    def set_version(self, version: int) -> None:
        self._version = version

    def get_version(self) -> int:
        return self._version

    def connect_engine(self, engine: Any, meta: Any) -> None:
        self.rollout_engine = engine
        self.rollout_coordinator = object()

    def _check_rollout_engine_connected(self) -> None:
        if self.rollout_engine is None or self.rollout_coordinator is None:
            raise RuntimeError("Rollout engine not connected.")

    def update_weights(self, meta: Any) -> None:
        self.calls.append("areal.update_weights")

    def save(self, meta: Any) -> None:
        with self._offload_aware_context():
            save_model_to_hf(self, meta.path)

    def load(self, meta: Any) -> None:
        with self._offload_aware_context():
            load_model_from_hf(self, meta.path)

    @contextmanager
    def _offload_aware_context(self) -> Any:
        self.calls.append("onload")
        yield
        self.calls.append("offload")

    def destroy(self) -> None:
        self.calls.append("areal.destroy")
        self.model_parts.clear()


class ArchonPPOActor(ArchonEngine):
    """AReaL's engine for a policy; the algorithm is not needed here."""
