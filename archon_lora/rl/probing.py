"""What the trainer writes down when it publishes: the answers by which an engine proves itself."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load

from archon_lora.engine import ArchonEngine
from archon_lora.engine.adapter_stream import AdapterStream
from archon_lora.engine.agree import attempt
from archon_lora.placement import reshard
from archon_lora.rl.scorer import Scorer
from ckpt.handoff.probe import Probe

PRESENT = "the trainer's present adapter"


class ProbeRecorder:
    """Records a probe of the adapter as it is; every rank has one and calls it together.

    Attributes:
        scorer: the model that answers; None on all ranks but the first.
    """

    def __init__(
        self,
        engine: ArchonEngine,
        scorer: Scorer | None,
        *,
        publish_dtype: torch.dtype,
        tolerance: float,
        timeout: float,
    ) -> None:
        """Say whose adapter and how.

        Args:
            engine: the trainer's.
            scorer: the model that answers, on the first rank.
            publish_dtype: of published adapters.
            tolerance: how far an engine's answer may be off, per token, in nats.
            timeout: seconds to wait for the other ranks.
        """
        self._engine = engine
        self._publish_dtype = publish_dtype
        self._tolerance = tolerance
        self._timeout = timeout
        self.scorer = scorer

    def record(self) -> dict[str, Any] | None:
        """The probe of the present adapter in the form that a manifest holds; collective.

        Returns:
            The record on the first rank, None on the others.

        Raises:
            AdapterMismatch: the adapter does not fit the model that answers.
            NonFiniteError: the adapter holds a value that is NaN or infinite.
            PeerFailed: one of these happened on the first rank.
        """
        reshard(self._engine.model)
        stream = AdapterStream(self._engine, base_model_name=self._engine.base_name, normalise=True)
        data, error = b"", None
        try:
            if stream.is_writer:
                data = b"".join(stream.weights().chunks)
        except Exception as caught:  # noqa: BLE001 - raised below, once the others can know
            error = caught
        stream.finish()
        probe: Probe | None = None
        with attempt(self._engine.cpu_group, what="recording a probe", timeout=self._timeout):
            if error is not None:
                raise error
            if self.scorer is not None:
                tensors = {k: t.to(self._publish_dtype) for k, t in load(data).items()}
                self.scorer.load(PRESENT, stream.peft_config, tensors)
                expected, base = self.scorer.answer()
                probe = Probe(
                    token_ids=self.scorer.prompt,
                    logprobs=expected,
                    base_logprobs=base,
                    tolerance=self._tolerance,
                    dtype=self.scorer.dtype,
                )
        return None if probe is None else probe.to_dict()
