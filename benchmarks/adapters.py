"""Sections about the adapter alone: published here, published to an object store."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import s3fs
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from ckpt import CheckpointManager, Retention, TrainState

from .peers import first_line
from .processes import Settings
from .rounds import Sample, interleave
from .s3_server import BUCKET, S3Server, running_server
from .savers import DEADLINE_S
from .workload import Workload, build_model, export

FILE = "adapter_model.safetensors"


class _Writer:
    """One way to bring the adapter's tensors to storage; waits until they are there."""

    name: ClassVar[str]

    def write(self, number: int) -> None:
        """Write; this is what is timed."""
        raise NotImplementedError

    def tidy(self, number: int) -> None:
        """Remove what was written; not timed."""

    def close(self) -> None:
        """End what it keeps running."""

    def measure(self, number: int) -> Sample:
        """``total`` and ``cpu`` (of all threads) in milliseconds."""
        used = time.process_time()
        began = time.perf_counter()
        self.write(number)
        total = time.perf_counter() - began
        used = time.process_time() - used
        self.tidy(number)
        return {"total": 1e3 * total, "cpu": 1e3 * used}


class Publish(_Writer):
    """``CheckpointManager.publish``: checksums, SHA-256, claim, config, fsync and commit."""

    name = "ckpt CheckpointManager.publish"

    def __init__(self, state: TrainState, root: str, options: dict[str, Any] | None = None) -> None:
        self._state = state
        self._manager = CheckpointManager(
            root, storage_options=options, retention=Retention(versions=1)
        )

    def write(self, number: int) -> None:
        """Publish and wait for the version."""
        del number
        self._manager.publish(self._state).published.result(DEADLINE_S)

    def tidy(self, number: int) -> None:
        """Let retention finish."""
        del number
        self._manager.wait(DEADLINE_S)

    def close(self) -> None:
        """Stop the manager's thread."""
        self._manager.close()


class PublishMaster(Publish):
    """The same from fp32 parameters, cast on the way."""

    name = "ckpt CheckpointManager.publish, from fp32"


class PublishObstore(Publish):
    """The same, the body sent by obstore."""

    name = "ckpt CheckpointManager.publish, obstore"


class SaveFile(_Writer):
    """``safetensors.torch.save_file``: neither checksum nor sync nor commit."""

    name = "safetensors.save_file"
    sync: ClassVar[bool] = False

    def __init__(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        self._tensors = tensors
        self._path = folder / f"{type(self).__name__}.safetensors"

    def write(self, number: int) -> None:
        """Write, and sync if that is asked for."""
        del number
        save_file(self._tensors, self._path, metadata={"format": "pt"})
        if self.sync:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def tidy(self, number: int) -> None:
        """Remove the file."""
        del number
        self._path.unlink()


class SaveFileSynced(SaveFile):
    """The same, synced."""

    name = "safetensors.save_file + fsync"
    sync = True


class TorchSaveAdapter(SaveFile):
    """``torch.save``."""

    name = "torch.save"

    def write(self, number: int) -> None:
        """Write."""
        del number
        torch.save(self._tensors, self._path)


class PeftSave(_Writer):
    """``save_pretrained`` of the same adapter in PEFT's own model, whose base has no memory."""

    name = "PEFT save_pretrained"

    def __init__(self, workload: Workload, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        from peft import LoraConfig, get_peft_model

        base = nn.Module()
        for path, inputs, outputs in workload.modules():
            parent = base
            *above, last = f"model.{path}".split(".")
            for part in above:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(inputs, outputs, bias=False, device="meta"))
        config = export(workload).peft_config
        lora = LoraConfig(r=config["r"], target_modules=config["target_modules"])
        self._model = get_peft_model(base, lora)  # type: ignore[arg-type]  # any module will do
        for name, module in self._model.named_modules():
            above, _, adapter = name.rpartition(".")
            if adapter == "default" and isinstance(module, nn.Linear):
                module.weight = nn.Parameter(tensors[f"{above}.weight"])
        self._folder = folder / "peft"

    def write(self, number: int) -> None:
        """Save weights and configuration."""
        self._model.save_pretrained(str(self._folder / f"{number}"), save_embedding_layers=False)

    def tidy(self, number: int) -> None:
        """Remove the directory."""
        shutil.rmtree(self._folder / f"{number}")


class DcpHuggingFace(_Writer):
    """DCP's Hugging Face writer with consolidation to one file."""

    name = "dcp HuggingFaceStorageWriter"

    def __init__(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        self._tensors = tensors
        self._folder = folder / "dcp-hf"

    def write(self, number: int) -> None:
        """Save and consolidate."""
        writer = HuggingFaceStorageWriter(
            path=str(self._folder / f"{number}"),
            fqn_to_index_mapping=dict.fromkeys(self._tensors, 1),
            save_distributed=True,
            enable_consolidation=True,
        )
        dcp.save(self._tensors, storage_writer=writer)

    def tidy(self, number: int) -> None:
        """Remove the directory."""
        shutil.rmtree(self._folder / f"{number}")


def _adapter(settings: Settings) -> tuple[TrainState, TrainState, dict[str, torch.Tensor]]:
    """The adapter in bf16 and in fp32 as states, and the PEFT tensors in bf16."""
    rules = export(settings.workload)
    states, tensors = [], {}
    for dtype in (torch.bfloat16, torch.float32):
        model = build_model(settings.workload, dtype)
        states.append(TrainState(model, export=rules))
        if dtype is torch.bfloat16:
            named = dict(model.named_parameters())
            tensors = {rule.key: named[rule.source].detach() for rule in rules.rules}
    return states[0], states[1], tensors


def publishes(settings: Settings) -> dict[str, Any]:
    """Every way to write the adapter to the file system of ``settings.folder``."""
    state, master, tensors = _adapter(settings)
    folder = settings.folder
    with ExitStack() as stack:
        trials: list[_Writer] = [
            Publish(state, str(folder / "bf16")),
            PublishMaster(master, str(folder / "fp32")),
            SaveFile(tensors, folder),
            SaveFileSynced(tensors, folder),
            TorchSaveAdapter(tensors, folder),
            PeftSave(settings.workload, tensors, folder),
            DcpHuggingFace(tensors, folder),
        ]
        for trial in trials:
            stack.callback(trial.close)
        rounds = interleave(trials, repeats=settings.repeats, seconds=settings.seconds)
    return {"bytes": sum(t.nbytes for t in tensors.values()), "rounds": rounds}


class _Remote(_Writer):
    """A writer whose requests the server counts."""

    inner: _Writer

    def __init__(self, inner: _Writer, server: S3Server) -> None:
        self.inner, self._server = inner, server
        self.name = inner.name  # type: ignore[misc]

    def measure(self, number: int) -> Sample:
        """``total`` and ``cpu`` (not the server's) in milliseconds, and ``requests``."""
        before = self._server.requests()
        used = time.process_time()
        began = time.perf_counter()
        self.inner.write(number)
        total = time.perf_counter() - began
        used = time.process_time() - used
        requests = self._server.requests() - before
        self.inner.tidy(number)
        return {"total": 1e3 * total, "cpu": 1e3 * used, "requests": float(requests)}

    def close(self) -> None:
        """End what the writer keeps running."""
        self.inner.close()


class PlainPut(_Writer):
    """One PUT of as many bytes with s3fs: the floor of an upload."""

    name = "s3fs pipe_file, one PUT"

    def __init__(self, size: int, server: S3Server) -> None:
        self._data = bytes(size)
        options = server.storage_options
        self._fs = s3fs.S3FileSystem(**options, skip_instance_cache=True)

    def write(self, number: int) -> None:
        """Put."""
        path = f"{BUCKET}/plain/{number}.safetensors"
        self._fs.pipe_file(path, self._data, chunksize=len(self._data) + 1)


class DcpFsspec(_Writer):
    """DCP's fsspec writer over s3fs, without ``os.sync``."""

    name = "dcp FsspecWriter (s3fs)"

    def __init__(self, tensors: dict[str, torch.Tensor], server: S3Server) -> None:
        self._tensors, self._options = tensors, server.storage_options

    def write(self, number: int) -> None:
        """Save."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        path = f"s3://{BUCKET}/dcp/{number}"
        writer = FsspecWriter(path, sync_files=False, **self._options)
        dcp.save(self._tensors, storage_writer=writer)


class S3TorchConnector(_Writer):
    """``s3torchconnector``'s DCP writer."""

    name = "s3torchconnector S3StorageWriter"

    def __init__(self, tensors: dict[str, torch.Tensor], server: S3Server) -> None:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector.dcp import S3StorageWriter

        self._tensors, self._writer = tensors, S3StorageWriter
        self._config = S3ClientConfig(force_path_style=True)
        server.export_environment()

    def write(self, number: int) -> None:
        """Save."""
        writer = self._writer(
            "us-east-1", f"s3://{BUCKET}/connector/{number}", s3client_config=self._config
        )
        dcp.save(self._tensors, storage_writer=writer)


def uploads(settings: Settings) -> dict[str, Any]:
    """Every way to bring the adapter to an S3 server (moto, in a process of its own)."""
    state, _master, tensors = _adapter(settings)
    size = sum(tensor.nbytes for tensor in tensors.values())
    skipped = {}
    with ExitStack() as stack:
        server = stack.enter_context(running_server(settings.folder))
        url = f"s3://{BUCKET}/ckpt"
        trials: list[_Writer] = [
            _Remote(Publish(state, url, server.storage_options), server),
            _Remote(PlainPut(size, server), server),
        ]
        obstore = {**server.storage_options, "backend": "obstore"}
        peers: dict[str, Callable[[], _Writer]] = {
            PublishObstore.name: lambda: PublishObstore(state, f"{url}-obstore", obstore),
            DcpFsspec.name: lambda: DcpFsspec(tensors, server),
            S3TorchConnector.name: lambda: S3TorchConnector(tensors, server),
        }
        for name, make in peers.items():
            try:
                trial = _Remote(make(), server)
                trial.measure(-1)
                trials.append(trial)
            except Exception as error:  # noqa: BLE001 - whatever a peer raises is the reason
                skipped[name] = first_line(error)
        for trial in trials:
            stack.callback(trial.close)
        rounds = interleave(trials, repeats=settings.repeats, seconds=settings.seconds)
    return {"bytes": size, "rounds": rounds, "skipped": skipped}
