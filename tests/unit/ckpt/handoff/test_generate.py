"""Sampling requests as the engines take them, and what of their answers is believed."""

import copy

import pytest

from ckpt.errors import ConfigError
from ckpt.handoff.generate import (
    Generated,
    Sampling,
    read_sglang,
    read_vllm,
    sglang_request,
    vllm_request,
)

PROMPT = [5, 6, 7]
TWO = Sampling(n=2, max_tokens=3, temperature=0.5, seed=9, stop_token_ids=(2,))
FOUND = [Generated((4, 8, 1), (-1.0, -2.5, -0.5), "length"), Generated((2,), (-3.0,), "stop")]


def vllm_answer():
    """The members that vLLM 0.32 gave and that are read."""
    return {
        "model": "run-v00000001",
        "choices": [
            {
                "index": index,
                "token_ids": list(item.token_ids),
                "prompt_token_ids": PROMPT,
                "finish_reason": item.finish,
                "logprobs": {"token_logprobs": list(item.logprobs)},
            }
            for index, item in enumerate(FOUND)
        ],
    }


def sglang_answer():
    """The members that SGLang 0.5.23 gave and that are read."""
    return [
        {
            "meta_info": {
                "prompt_tokens": 3,
                "finish_reason": {"type": item.finish},
                "output_token_logprobs": [
                    [value, token, None]
                    for value, token in zip(item.logprobs, item.token_ids, strict=True)
                ],
            }
        }
        for item in FOUND
    ]


def test_requests_leave_no_default_to_the_engine():
    body = vllm_request("run-v00000001", PROMPT, TWO)
    assert body == {
        "model": "run-v00000001", "prompt": PROMPT, "n": 2, "max_tokens": 3, "temperature": 0.5,
        "seed": 9, "stop_token_ids": [2], "ignore_eos": False, "logprobs": 0,
        "return_token_ids": True, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    body = sglang_request("run-v00000001", PROMPT, TWO)
    plain = {
        "max_new_tokens": 3, "temperature": 0.5, "stop_token_ids": [2], "ignore_eos": False,
        "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    assert body == {
        "input_ids": [PROMPT, PROMPT],
        "sampling_params": [plain | {"sampling_seed": 9}, plain | {"sampling_seed": 10}],
        "return_logprob": True,
        "logprob_start_len": -1,
        "lora_path": ["run-v00000001"] * 2,
    }


def test_without_stop_ids_nothing_ends_a_completion_early():
    free = Sampling(max_tokens=3)
    assert vllm_request("base", PROMPT, free)["ignore_eos"] is True
    body = sglang_request(None, PROMPT, free)
    assert body["sampling_params"][0]["ignore_eos"] is True
    assert "lora_path" not in body


def test_seeds_stay_within_what_engines_take():
    last = Sampling(n=2, max_tokens=1, seed=2**63 - 1)
    seeds = [p["sampling_seed"] for p in sglang_request(None, PROMPT, last)["sampling_params"]]
    assert seeds == [2**63 - 1, 0]


def test_answers_are_read():
    shuffled = vllm_answer()
    shuffled["choices"].reverse()
    assert read_vllm(shuffled, "run-v00000001", PROMPT, TWO) == FOUND
    assert read_sglang(sglang_answer(), PROMPT, TWO) == FOUND


def spoil(change):
    def spoilt(kind):
        answer = copy.deepcopy(vllm_answer() if kind == "vllm" else sglang_answer())
        change[kind](answer)
        return answer

    return spoilt


SPOILT = {
    "another prompt": {
        "vllm": lambda a: a["choices"][1].update(prompt_token_ids=[5, 6, 8]),
        "sglang": lambda a: a[1]["meta_info"].update(prompt_tokens=4),
    },
    "too few": {"vllm": lambda a: a["choices"].pop(), "sglang": lambda a: a.pop()},
    "aborted": {
        "vllm": lambda a: a["choices"][0].update(finish_reason="abort"),
        "sglang": lambda a: a[0]["meta_info"]["finish_reason"].update(type="abort"),
    },
    "no tokens": {
        "vllm": lambda a: a["choices"][0].update(token_ids=[], logprobs={"token_logprobs": []}),
        "sglang": lambda a: a[0]["meta_info"].update(output_token_logprobs=[]),
    },
    "too many tokens": {
        "vllm": lambda a: a["choices"][0].update(
            token_ids=[1] * 4, logprobs={"token_logprobs": [-1.0] * 4}
        ),
        "sglang": lambda a: a[0]["meta_info"].update(output_token_logprobs=[[-1.0, 1, None]] * 4),
    },
    "a value that is none": {
        "vllm": lambda a: a["choices"][0]["logprobs"].update(token_logprobs=[None, -1.0, -1.0]),
        "sglang": lambda a: a[0]["meta_info"]["output_token_logprobs"][0].__setitem__(0, None),
    },
    "a value that is not finite": {
        "vllm": lambda a: a["choices"][1]["logprobs"].update(token_logprobs=[float("nan")]),
        "sglang": lambda a: a[1]["meta_info"]["output_token_logprobs"][0].__setitem__(
            0, float("-inf")
        ),
    },
    "a token that is none": {
        "vllm": lambda a: a["choices"][1].update(token_ids=["2"]),
        "sglang": lambda a: a[1]["meta_info"]["output_token_logprobs"][0].__setitem__(1, -1),
    },
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_no_answer_to_the_request_is_refused(what):
    with pytest.raises((KeyError, TypeError, ValueError)):
        read_vllm(spoil(SPOILT[what])("vllm"), "run-v00000001", PROMPT, TWO)
    with pytest.raises((KeyError, TypeError, ValueError)):
        read_sglang(spoil(SPOILT[what])("sglang"), PROMPT, TWO)


def test_an_answer_of_another_adapter_is_refused():
    with pytest.raises(ValueError, match="run-v00000001"):
        read_vllm(vllm_answer(), "run-v00000002", PROMPT, TWO)


@pytest.mark.parametrize(
    "wrong",
    [{"n": 0}, {"max_tokens": 0}, {"temperature": 0.0}, {"temperature": float("inf")},
     {"seed": -1}, {"seed": 2**63}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError):
        Sampling(**{"max_tokens": 3} | wrong)
