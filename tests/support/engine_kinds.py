"""The two kinds of stand-in engines, without HTTP: names, weights in memory, answers, faults."""

from __future__ import annotations

import argparse
import os
import threading
import time
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from support.engine_brains import Adapter, make_brain


class Answer(Exception):
    """Ends a request with a status and a body."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status)
        self.status, self.body = status, body


class Dropped(Exception):
    """Ends the connection without an answer."""


class Engine:
    """What the two kinds have in common: names, weights in memory, faults."""

    kind = ""
    generate_path = ""
    load_path = ""
    unload_path = ""

    def __init__(self, args: argparse.Namespace) -> None:
        self.brain = make_brain(args.model)
        self.model = args.model or "hashed"
        self.key: str | None = args.api_key
        self.max_rank: int = args.max_lora_rank
        self.max_loaded: int | None = args.max_loaded
        self.lock = threading.RLock()
        self.names: OrderedDict[str, str] = OrderedDict()
        self.memory: dict[str, Adapter] = {}
        self.served_as: dict[str, Adapter | None] = {}
        self.unlisted: set[str] = set()
        self.running: dict[str, int] = {}
        self.faults: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.started = time.time()
        self.spoilt = False
        self.rng = np.random.default_rng(0)

    def fault(self, at: str, name: str | None) -> dict[str, Any] | None:
        """The fault that is due at a place, counted down."""
        with self.lock:
            for item in self.faults:
                if item["at"] != at or item.get("name", name) != name:
                    continue
                if item.get("times") == 0:
                    continue
                if item.get("times") is not None:
                    item["times"] -= 1
                break
            else:
                return None
        return item

    def fail(self, item: dict[str, Any]) -> None:
        """Carry out a fault that is no success."""
        do = item["do"]
        if do == "error":
            raise Answer(item.get("status", 500), self.error("injected", item.get("status", 500)))
        if do == "hang":
            time.sleep(item["seconds"])
        elif do == "drop":
            raise Dropped
        elif do == "die":
            os._exit(1)

    def at(self, place: str, name: str | None = None) -> dict[str, Any] | None:
        item = self.fault(place, name)
        if item is not None and not item.get("after"):
            self.fail(item)
        return item

    def done(self, item: dict[str, Any] | None) -> None:
        if item is not None and item.get("after"):
            self.fail(item)

    def error(self, message: str, code: int) -> Any:
        raise NotImplementedError

    def take(self, name: str, path: str, item: dict[str, Any] | None) -> None:
        """Put an adapter into memory, as it is or as a fault wants it."""
        adapter = Adapter.read(path).matched(self.kind)
        served: Adapter | None = adapter
        do = None if item is None else item["do"]
        if do == "base":
            served = None
        elif do == "other":
            served = Adapter.read(item["path"]).matched(self.kind)
        elif do == "half":
            served = adapter.half()
        if served is not None:
            _ = served.digest  # an engine's work is done when the load answers, too
        self.memory[name], self.served_as[name] = adapter, served
        if do == "unlisted":
            self.unlisted.add(name)
        self.names[name] = path

    def cards(self) -> dict[str, Any]:
        self.at("models")
        base = {"id": "base", "object": "model", "root": self.model, "parent": None}
        with self.lock:
            adapters = [
                {"id": name, "object": "model", "root": path, "parent": "base"}
                for name, path in self.names.items()
                if name not in self.unlisted
            ]
        return {"object": "list", "data": [base, *adapters]}

    def rows(self, ids: list[int], name: str | None) -> np.ndarray:
        adapter = None if name is None else self.served_as[name]
        rows = self.brain.logprobs(ids, adapter)
        item = self.fault("answer", name)
        if item is not None and item["do"] == "nan":
            self.spoilt = True
        return np.full_like(rows, np.nan) if self.spoilt else rows

    def sample(
        self,
        ids: list[int],
        name: str | None,
        *,
        count: int,
        temperature: float,
        stop: set[int],
        scaled: bool,
        seed: int | None,
    ) -> tuple[list[int], list[float], str]:
        """New tokens and their log-probabilities, of the distribution at temperature 1 or not."""
        new: list[int] = []
        values: list[float] = []
        rng = self.rng if seed is None else np.random.default_rng(seed)
        for _ in range(count):
            row = self.rows([*ids, *new], name)[-1]
            if temperature == 0:
                token, told = int(np.argmax(row)), row
            else:
                warm = row / temperature
                warm = warm - np.log(np.exp(warm - warm.max()).sum()) - warm.max()
                with self.lock:
                    token = int(np.argmax(warm + rng.gumbel(size=len(warm))))
                told = warm if scaled else row
            new.append(token)
            values.append(float(told[token]))
            if token in stop:
                return new, values, "stop"
        return new, values, "length"

    def get(self, path: str) -> Any:
        if path == "/health":
            self.at("health")
            return ""
        if path == "/v1/models":
            return self.cards()
        raise Answer(404, {"detail": "Not Found"})

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == self.load_path:
            return self.load(body["lora_name"], body["lora_path"])
        if path == self.unload_path:
            return self.unload(body["lora_name"])
        if path == self.generate_path:
            return self.generate(body)
        raise Answer(404, {"detail": "Not Found"})

    def load(self, name: str, path: str) -> Any:
        raise NotImplementedError

    def unload(self, name: str) -> Any:
        raise NotImplementedError

    def generate(self, body: dict[str, Any]) -> Any:
        raise NotImplementedError


class Vllm(Engine):
    """As vLLM 0.32 answers."""

    kind = "vllm"
    load_path, unload_path = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    generate_path = "/v1/completions"

    def error(self, message: str, code: int) -> Any:
        kinds = {400: "InvalidUserInput", 404: "NotFoundError"}
        kind = kinds.get(code, "InternalServerError")
        return {"error": {"message": message, "type": kind, "param": None, "code": code}}

    def get(self, path: str) -> Any:
        if path == "/metrics":
            self.at("incarnation")
            return f"# TYPE x gauge\nprocess_start_time_seconds {self.started!r}\n"
        return super().get(path)

    def load(self, name: str, path: str) -> Any:
        item = self.at("load", name)
        with self.lock:
            if name in self.names:
                text = f"The lora adapter '{name}' has already been loaded. If you want to load the"
                text += " adapter in place, set 'load_inplace' to True."
                raise Answer(400, self.error(text, 400))
            try:
                adapter = Adapter.read(path)
            except FileNotFoundError:
                text = f"Loading lora {name} failed: No adapter found for <path>"
                raise Answer(404, self.error(text, 404)) from None
            failed = "Call to add_lora method failed: Worker failed with error '"
            if adapter.config["r"] > self.max_rank:
                text = f"LoRA rank {adapter.config['r']} is greater than max_lora_rank"
                raise Answer(500, self.error(f"{failed}{text} {self.max_rank}.'", 500))
            for key in adapter.tensors:
                if not key.endswith(("lora_A.weight", "lora_B.weight")):
                    text = f"{failed}{key} is unsupported LoRA weight', <path>"
                    raise Answer(500, self.error(text, 500))
            self.take(name, path, item)
        self.done(item)
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> Any:
        item = self.at("unload", name)
        with self.lock:
            if name not in self.names:
                raise Answer(404, self.error(f"The lora adapter '{name}' cannot be found.", 404))
            del self.names[name]
        self.done(item)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def generate(self, body: dict[str, Any]) -> Any:
        name = None if body["model"] == "base" else body["model"]
        if name is not None and name not in self.names:
            text = f"The model `{name}` does not exist. Valid aliases: base."
            raise Answer(404, self.error(text, 404))
        item = self.at("generate", name)
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices: list[dict[str, Any]] = []
        for ids in prompts:
            rows = self.rows(ids, name)
            for number in range(body.get("n", 1)):
                new, values, finish = self.sample(
                    ids,
                    name,
                    count=body.get("max_tokens", 16),
                    temperature=body.get("temperature", 1.0),
                    stop=set(body.get("stop_token_ids") or ()),
                    scaled=False,
                    seed=None if body.get("seed") is None else body["seed"] + number,
                )
                choice: dict[str, Any] = {
                    "index": len(choices),
                    "text": "".join(chr(33 + token % 90) for token in new),
                    "finish_reason": finish,
                    "logprobs": None,
                    "token_ids": None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": None,
                }
                if body.get("logprobs") is not None:
                    choice["logprobs"] = {
                        "tokens": [f"token_id:{token}" for token in new],
                        "token_logprobs": values,
                    }
                if body.get("return_token_ids"):
                    choice["token_ids"], choice["prompt_token_ids"] = new, ids
                if body.get("prompt_logprobs") is not None:
                    told = [
                        {str(token): {"logprob": float(row[token]), "rank": 1}}
                        for row, token in zip(rows, ids[1:], strict=False)
                    ]
                    choice["prompt_logprobs"] = [None, *told]
                choices.append(choice)
        self.done(item)
        return {
            "id": f"cmpl-{uuid.uuid4().hex[:16]}",
            "object": "text_completion",
            "model": body["model"],
            "choices": choices,
        }


class Sglang(Engine):
    """As SGLang 0.5.23 answers."""

    kind = "sglang"
    load_path, unload_path = "/load_lora_adapter", "/unload_lora_adapter"
    generate_path = "/generate"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.ever: dict[str, str] = {}  # names outlive an unload here

    def error(self, message: str, code: int) -> Any:
        return {"error": {"message": message}, "code": code}

    def get(self, path: str) -> Any:
        if path == "/server_info":
            self.at("incarnation")
            return {"startup_time": {"tokenizer_e2e": self.started}, "random_seed": 1}
        return super().get(path)

    def outcome(self, problem: str = "") -> dict[str, Any]:
        return {
            "success": not problem,
            "error_message": problem,
            "loaded_adapters": None if problem.endswith("exist") else dict(self.names),
        }

    def load(self, name: str, path: str) -> Any:
        item = self.at("load", name)
        with self.lock:
            if name in self.names:
                text = f"Failed to load LoRA adapter {name} because it is already loaded"
                raise Answer(400, self.outcome(text))
            if not Path(path).is_dir():
                text = f"Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{path}'"
                raise Answer(400, self.outcome(text))
            adapter = Adapter.read(path)
            for member in ("peft_type", "target_modules"):
                if member not in adapter.config:
                    raise Answer(400, self.outcome(f"'{member}'"))
            if adapter.config["r"] > self.max_rank:
                text = f"LoRA adapter {name} with rank {adapter.config['r']} is incompatible"
                raise Answer(400, self.outcome(text))
            self.take(name, path, item)
            self.ever[name] = path
            # No refusal when it is full: the one that was used least recently goes.
            while self.max_loaded is not None and len(self.names) > self.max_loaded:
                self.names.popitem(last=False)
        self.done(item)
        return self.outcome()

    def unload(self, name: str) -> Any:
        item = self.at("unload", name)
        with self.lock:
            if name not in self.names:
                raise Answer(400, self.outcome(f"LoRA with name {name} does not exist"))
            del self.names[name]
        while self.running.get(name):
            time.sleep(0.01)
        self.done(item)
        return self.outcome()

    def generate(self, body: dict[str, Any]) -> Any:
        many = isinstance(body["input_ids"][0], list)
        prompts = body["input_ids"] if many else [body["input_ids"]]
        given = body.get("lora_path")
        names = given if isinstance(given, list) else [given] * len(prompts)
        params = body.get("sampling_params") or {}
        params = params if isinstance(params, list) else [params] * len(prompts)
        for name in set(names) - {None}:
            with self.lock:
                if name not in self.ever:
                    text = f"Got LoRA adapter that has never been loaded: {name}\n"
                    raise Answer(400, self.error(f"{text}All loaded adapters: ...", 400))
                if name not in self.names:  # unloaded or pushed out: read again, as it lies there
                    self.take(name, self.ever[name], None)
                self.names.move_to_end(name)
                if self.memory[name].ends_sglang:
                    os._exit(1)
                self.running[name] = self.running.get(name, 0) + 1
        try:
            answers = [
                answer
                for ids, name, own in zip(prompts, names, params, strict=True)
                for answer in self.answers(body, ids, name, own)
            ]
        finally:
            with self.lock:
                for name in set(names) - {None}:
                    self.running[name] -= 1
        return answers if many or len(answers) > 1 else answers[0]

    def answers(
        self, body: dict[str, Any], ids: list[int], name: str | None, params: dict[str, Any]
    ) -> list[Any]:
        item = self.at("generate", name)
        first = body.get("logprob_start_len", -1)
        told: list[Any] = []
        if body.get("return_logprob") and first == 0:
            rows = self.rows(ids, name)
            pairs = zip(rows, ids[1:], strict=False)
            told = [[None, ids[0], None]]
            told += [[float(row[token]), token, None] for row, token in pairs]
        found = []
        for _ in range(params.get("n", 1)):
            new, values, finish = self.sample(
                ids,
                name,
                count=params.get("max_new_tokens", 128),
                temperature=params.get("temperature", 1.0),
                stop=set(params.get("stop_token_ids") or ()),
                scaled=True,
                seed=params.get("sampling_seed"),
            )
            meta: dict[str, Any] = {
                "id": uuid.uuid4().hex,
                "finish_reason": {"type": finish},
                "prompt_tokens": len(ids),
                "completion_tokens": len(new),
                "weight_version": "default",
            }
            if body.get("return_logprob"):
                meta["input_token_logprobs"] = told
                meta["output_token_logprobs"] = [
                    [value, token, None] for value, token in zip(values, new, strict=True)
                ]
            text = "".join(chr(33 + token % 90) for token in new)
            found.append({"text": text, "output_ids": new, "meta_info": meta})
        self.done(item)
        return found
