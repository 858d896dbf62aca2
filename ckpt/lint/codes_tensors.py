"""The rules on keys, shapes and values of tensors; see :mod:`ckpt.lint.codes`."""

from __future__ import annotations

from typing import Final

from .finding import Effect, Rule

_REFUSED, _WRONG, _DIES, _TAKEN = Effect.REFUSED, Effect.WRONG, Effect.DIES, Effect.TAKEN

TENSOR_RULES: Final = (
    Rule(
        "empty",
        "no factor in the file",
        "export an adapter that has tensors",
        {
            "peft": (_WRONG, "serves the base model, with a warning"),
            "vllm": (_REFUSED, "answers 500 with an empty message"),
            "sglang": (_WRONG, "answers 200 and serves the base model"),
        },
    ),
    Rule(
        "key-prefix",
        "keys without base_model.model.",
        "write base_model.model.<module>.lora_A.weight",
        {"peft": (_WRONG, "serves the base model, with a warning")},
    ),
    Rule(
        "key-path",
        "keys with the path of a module that the base model has elsewhere",
        "write the module's full name, such as model.layers.0.self_attn.q_proj",
        {
            "peft": (_WRONG, "serves the base model, with a warning"),
            "vllm": (_WRONG, "answers 200 and serves the base model: only the ending is checked"),
        },
    ),
    Rule(
        "key-adapter-name",
        "an adapter's name in the keys (lora_A.default.weight)",
        "save with PEFT's save_pretrained, which takes the name out",
        {"vllm": (_REFUSED, "'unsupported LoRA weight' (500)")},
    ),
    Rule(
        "key-twice",
        "two keys for the same factor",
        "save one adapter in a file",
        {
            "peft": (_TAKEN, "keeps the one without an adapter's name"),
            "vllm": (_REFUSED, "'unsupported LoRA weight' (500)"),
            "sglang": (_WRONG, "keeps one of them, or answers 400"),
        },
    ),
    Rule(
        "key-unknown",
        "a tensor that is no factor",
        "take the tensor out; an adapter has lora_A and lora_B only",
        {
            "peft": (_TAKEN, "loads it if the model has a tensor of that name, else leaves it out"),
            "vllm": (_REFUSED, "'unsupported LoRA weight' (500)"),
            "sglang": (_WRONG, "leaves it out"),
        },
    ),
    Rule(
        "saved-embedding",
        "a whole embedding or output head in the file",
        "save with save_embedding_layers=False",
        {
            "vllm": (_REFUSED, "'unsupported LoRA weight' (500)"),
            "sglang": (_WRONG, "ignores it and serves the base model's"),
        },
    ),
    Rule(
        "embedding-lora",
        "factors on the embedding or the output head",
        "adapt the layers' linear modules only",
        {
            "vllm": (_REFUSED, "takes them for some models only (llama, qwen3, mixtral)"),
            "sglang": (_TAKEN, "if its --lora-target-modules names them; else it answers 400"),
        },
    ),
    Rule(
        "missing-a",
        "lora_B without lora_A",
        "export both factors of every module",
        {
            "peft": (_WRONG, "keeps a random A, with a warning"),
            "vllm": (
                _WRONG,
                "answers 200 and computes something else, or raises (500)",
            ),
            "sglang": (_DIES, "answers 200; then computes something else, or dies"),
        },
    ),
    Rule(
        "missing-b",
        "lora_A without lora_B",
        "export both factors of every module",
        {
            "peft": (_WRONG, "leaves the module as it is, with a warning"),
            "vllm": (_REFUSED, "raises (500)"),
            "sglang": (_DIES, "answers 200 and dies at the first use"),
        },
    ),
    Rule(
        "tensor-shape",
        "a factor that is no matrix",
        "export A as (r, in) and B as (out, r)",
        {
            "peft": (_REFUSED, "a size error, unless the module is a convolution"),
            "vllm": (_REFUSED, "takes matrices only"),
            "sglang": (_DIES, "answers 400 in q/k/v and gate/up; elsewhere dies at the first use"),
        },
    ),
    Rule(
        "tensor-rank",
        "a rank in the tensors that is not the configuration's",
        "write the tensors' rank as r, or export again",
        {
            "peft": (_REFUSED, "a size error"),
            "vllm": (_WRONG, "answers 200 and scales by the r of the configuration"),
            "sglang": (_DIES, "answers 200 and dies at the first use"),
        },
    ),
    Rule(
        "mixed-rank-group",
        "rank_pattern gives q/k/v or gate/up different ranks",
        "export normalised: pad all to the largest rank, no pattern",
        {
            "vllm": (_TAKEN, "right from 0.32 on; 0.31 and older mis-scale it silently"),
            "sglang": (_REFUSED, "cannot stack them: sizes must match (400)"),
        },
    ),
    Rule(
        "mixed-rank",
        "rank_pattern gives modules other ranks than r",
        "export normalised: pad all to the largest rank, no pattern",
        {
            "vllm": (_TAKEN, "right from 0.32 on; 0.31 and older mis-scale it silently"),
            "sglang": (_DIES, "answers 200; its buffers have the r of the configuration"),
        },
    ),
    Rule(
        "vllm-max-rank",
        "a rank above vLLM's limit",
        "start vLLM with a larger --max-lora-rank (1, 8, 16, 32, 64, 128, 256, 320 or 512)",
        {"vllm": (_REFUSED, "is greater than max_lora_rank (500)")},
    ),
    Rule(
        "sglang-max-rank",
        "a rank above SGLang's limit",
        "start SGLang with a larger --max-lora-rank",
        {"sglang": (_REFUSED, "its buffers are smaller (400)")},
    ),
    Rule(
        "group-q-without-v",
        "q_proj adapted without v_proj",
        "adapt the whole group q_proj, k_proj, v_proj",
        {"sglang": (_REFUSED, "KeyError '…v_proj…' (400)")},
    ),
    Rule(
        "group-without-q",
        "k_proj or v_proj adapted without q_proj",
        "adapt the whole group q_proj, k_proj, v_proj",
        {"sglang": (_DIES, "answers 200 and dies at the first use")},
    ),
    Rule(
        "group-up-without-gate",
        "up_proj adapted without gate_proj",
        "adapt gate_proj and up_proj together",
        {"sglang": (_DIES, "answers 200 and dies at the first use")},
    ),
    Rule(
        "group-q-a-without-kv-a",
        "q_a_proj adapted without kv_a_proj_with_mqa",
        "adapt the two together",
        {"sglang": (_WRONG, "fills the other with zeros of a wrong size")},
    ),
    Rule(
        "fused-projection",
        "a fused qkv_proj or gate_up_proj",
        "export the projections one by one, under the names that the base model has",
        {
            "peft": (_WRONG, "has no such module and serves the base model, with a warning"),
            "vllm": (_REFUSED, "raises (500): it fuses them itself"),
        },
    ),
    Rule(
        "module-absent",
        "a module that the base model does not have",
        "use the names of the HuggingFace model; give --base the model that is served",
        {
            "peft": (_WRONG, "ignores the tensors, with a warning"),
            "vllm": (_REFUSED, "'expected target modules in … but received …' (500)"),
            "sglang": (_REFUSED, "does not know the module"),
        },
    ),
    Rule(
        "layer-range",
        "a layer beyond the base model's last",
        "take those tensors out; give --base the model that is served",
        {
            "peft": (_TAKEN, "ignores those tensors"),
            "vllm": (_TAKEN, "ignores those tensors"),
            "sglang": (_REFUSED, "'index … is out of range' (400)"),
        },
    ),
    Rule(
        "base-shape",
        "a factor whose size is not the base module's",
        "export for the base model that is served",
        {
            "peft": (_REFUSED, "a size error"),
            "vllm": (_WRONG, "copies a smaller one in part, and fails on a larger one"),
            "sglang": (_DIES, "answers 400 in q/k/v and gate/up; elsewhere dies at the first use"),
        },
    ),
    Rule(
        "moe-fused-experts",
        "one tensor for all experts of a layer",
        "export two-dimensional factors for each expert, or adapt the attention alone",
        {
            "vllm": (_REFUSED, "takes them for models with fused experts only"),
            "sglang": (_REFUSED, "does not support PEFT's experts.base_layer"),
        },
    ),
    Rule(
        "moe-experts-single",
        "experts one by one, of a model whose experts PEFT wants stacked",
        "export them stacked: ckpt export --experts stacked",
        {"peft": (_WRONG, "loads the adapter without them and says nothing")},
    ),
    Rule(
        "moe-experts-missing",
        "some experts of a layer without factors",
        "export every expert",
        {"vllm": (_REFUSED, "wants every expert of a layer")},
    ),
    Rule(
        "moe-experts-ranks",
        "experts of one projection with different ranks",
        "export normalised: one rank for all",
        {"vllm": (_REFUSED, "stacks the experts of a projection, which need one rank")},
    ),
    Rule(
        "dtype",
        "a tensor that holds no floating-point numbers",
        "export as bfloat16 or float32",
        dict.fromkeys(("peft", "vllm", "sglang"), (_WRONG, "casts the stored numbers as they are")),
    ),
    Rule(
        "dtype-unusual",
        "a dtype other than bfloat16, float16 or float32",
        "export as bfloat16 or float32",
        dict.fromkeys(("peft", "vllm", "sglang"), (_TAKEN, "casts it to the model's dtype")),
    ),
    Rule(
        "dtype-mixed",
        "tensors of several dtypes",
        "export all in one dtype",
        dict.fromkeys(("peft", "vllm", "sglang"), (_TAKEN, "casts them to the model's dtype")),
    ),
    Rule(
        "non-finite",
        "NaN or infinity",
        "find the step at which training diverged; export an earlier one",
        {
            "peft": (_WRONG, "computes NaN"),
            "vllm": (_WRONG, "answers 200; then requests to the base model give NaN as well"),
            "sglang": (_WRONG, "answers 200 and computes NaN"),
        },
    ),
    Rule(
        "no-effect",
        "every B (or every A) is zero",
        "nothing was trained yet, or the wrong tensors were exported",
        dict.fromkeys(("peft", "vllm", "sglang"), (_TAKEN, "serves the base model")),
    ),
)
