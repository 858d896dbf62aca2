"""The rules on ``adapter_config.json``; see :mod:`ckpt.lint.codes`."""

from __future__ import annotations

from typing import Final

from .finding import Effect, Rule

_REFUSED, _WRONG, _DIES, _TAKEN = Effect.REFUSED, Effect.WRONG, Effect.DIES, Effect.TAKEN

CONFIG_RULES: Final = (
    Rule(
        "peft-type-missing",
        "no peft_type",
        'set "peft_type": "LORA"',
        {"peft": (_REFUSED, "KeyError"), "sglang": (_REFUSED, "answers 400")},
    ),
    Rule(
        "peft-type",
        "peft_type is not LORA",
        "only LoRA adapters are served; convert it",
        {
            "peft": (_WRONG, "builds another kind of adapter, and the tensors do not fit it"),
            "vllm": (_TAKEN, "does not read peft_type; the keys decide"),
            "sglang": (_REFUSED, "takes LORA only"),
        },
    ),
    Rule(
        "rank-missing",
        "no r",
        "set r to the rank of the tensors",
        {
            "peft": (_TAKEN, "takes 8"),
            "vllm": (_REFUSED, "requires it"),
            "sglang": (_REFUSED, "requires it"),
        },
    ),
    Rule(
        "rank-invalid",
        "r is no rank",
        "set r to the rank of the tensors, an integer of 1 or more",
        dict.fromkeys(("peft", "vllm", "sglang"), (_REFUSED, "cannot use it")),
    ),
    Rule(
        "alpha-missing",
        "no lora_alpha",
        "set lora_alpha; the scaling is lora_alpha / r",
        {
            "peft": (_TAKEN, "takes 8"),
            "vllm": (_REFUSED, "requires it"),
            "sglang": (_REFUSED, "requires it"),
        },
    ),
    Rule(
        "alpha-invalid",
        "lora_alpha is no number",
        "set lora_alpha to a number; the scaling is lora_alpha / r",
        dict.fromkeys(("peft", "vllm", "sglang"), (_REFUSED, "cannot divide it by r")),
    ),
    Rule(
        "alpha-not-finite",
        "lora_alpha is NaN or infinite",
        "set lora_alpha to a finite number; the scaling is lora_alpha / r",
        dict.fromkeys(("peft", "vllm", "sglang"), (_WRONG, "scales with it and computes NaN")),
    ),
    Rule(
        "target-modules-missing",
        "no target_modules",
        "set target_modules to the sorted list of the adapted modules' last names",
        {
            "peft": (_TAKEN, "takes its own list for the model type, mostly q_proj and v_proj"),
            "vllm": (_REFUSED, "requires it (500)"),
            "sglang": (_REFUSED, "requires it (400)"),
        },
    ),
    Rule(
        "target-modules-default",
        "no target_modules, and other modules than q_proj and v_proj adapted",
        "set target_modules to the sorted list of the adapted modules' last names",
        {"peft": (_WRONG, "loads what its own list for the model type names, and no more")},
    ),
    Rule(
        "target-modules-invalid",
        "target_modules is neither a list of names nor a text that compiles",
        "set target_modules to the sorted list of the adapted modules' last names",
        {
            "peft": (_REFUSED, "cannot match modules with it"),
            "sglang": (_REFUSED, "wants a list of names"),
        },
    ),
    Rule(
        "target-modules-empty",
        "target_modules is empty",
        "set target_modules to the sorted list of the adapted modules' last names",
        {"peft": (_REFUSED, "ValueError: no target modules")},
    ),
    Rule(
        "target-modules-sglang",
        "target_modules names a module that SGLang does not know",
        "use the names of the HuggingFace model (q_proj, …, down_proj)",
        {"sglang": (_REFUSED, "no --lora-target-modules can have it (400)")},
    ),
    Rule(
        "target-modules-regex",
        "target_modules is a regular expression",
        "write the sorted list of the adapted modules' last names",
        {"sglang": (_REFUSED, "takes a list, 'all' or 'all-linear' only (400)")},
    ),
    Rule(
        "target-modules-none",
        "target_modules covers none of the adapted modules",
        "write the sorted list of the adapted modules' last names",
        {"peft": (_REFUSED, "ValueError: no target module found, or no weight has its place")},
    ),
    Rule(
        "target-modules-cover",
        "target_modules leaves out modules that have tensors",
        "add their names, or take the tensors out",
        {"peft": (_WRONG, "loads the adapter without them and warns of unexpected keys")},
    ),
    Rule(
        "target-modules-unused",
        "target_modules names modules without tensors",
        "leave out names that have no tensors",
        {"peft": (_TAKEN, "warns of missing keys and leaves those modules as they are")},
    ),
    Rule(
        "layers-to-transform",
        "layers_to_transform beside a target_modules text",
        "write target_modules as a list, or drop layers_to_transform",
        {"peft": (_REFUSED, "ValueError: the two do not go together")},
    ),
    Rule(
        "alpha-pattern",
        "alpha_pattern gives modules scalings of their own",
        "export normalised: fold the scaling into B, lora_alpha = r, no pattern",
        {
            "vllm": (_TAKEN, "right from 0.32 on; 0.31 and older scale them like all others"),
            "sglang": (_WRONG, "ignores it and scales every module by lora_alpha / r"),
        },
    ),
    Rule(
        "rslora",
        "use_rslora: the scaling is lora_alpha / sqrt(r)",
        "export normalised: fold the scaling into B, lora_alpha = r, use_rslora off",
        {"sglang": (_WRONG, "ignores it and scales by lora_alpha / r")},
    ),
    Rule(
        "rslora-experts",
        "use_rslora on the experts of a mixture",
        "export normalised: fold the scaling into B, lora_alpha = r, use_rslora off",
        {"vllm": (_TAKEN, "mis-scales experts in releases before the fix of November 2026")},
    ),
    Rule(
        "dora",
        "DoRA (use_dora, lora_magnitude_vector)",
        "train plain LoRA, or merge the adapter into the base model",
        {
            "vllm": (_REFUSED, "raises (500)"),
            "sglang": (_REFUSED, "answers 400; 0.5.10 did not look and computed plain LoRA"),
        },
    ),
    Rule(
        "lora-bias",
        "lora_bias: a bias on lora_B",
        "train without lora_bias",
        {
            "vllm": (_REFUSED, "raises (500)"),
            "sglang": (_DIES, "ignores the bias or crashes on it"),
        },
    ),
    Rule(
        "bias",
        "trained biases (bias is not none)",
        "train with bias='none'",
        {
            "vllm": (_REFUSED, "raises: bias must be none"),
            "sglang": (_WRONG, "leaves biases out; answers 400 to those of q/k/v and gate/up"),
        },
    ),
    Rule(
        "modules-to-save",
        "modules_to_save: whole modules were trained",
        "train without modules_to_save, or merge them into the base model",
        {
            "vllm": (_REFUSED, "raises (500)"),
            "sglang": (_WRONG, "drops them and serves the base model's"),
        },
    ),
    Rule(
        "modules-to-save-head",
        "modules_to_save with a classification head",
        "train without modules_to_save, or merge them into the base model",
        {"sglang": (_WRONG, "drops it")},
    ),
    Rule(
        "init-weights",
        "init_lora_weights of a kind that changes the base weights",
        "convert to plain LoRA (PEFT: path_initial_model_for_weight_conversion), then write true",
        {
            "vllm": (_REFUSED, "raises: the base weights would have to change"),
            "sglang": (_WRONG, "ignores it and adds the factors to unchanged base weights"),
        },
    ),
    Rule(
        "variant",
        "a variant of LoRA that vLLM looks for",
        "train plain LoRA, or merge the adapter into the base model",
        {
            "vllm": (_REFUSED, "raises"),
            "sglang": (_WRONG, "does not read the field and computes plain LoRA"),
        },
    ),
    Rule(
        "variant-unread",
        "a variant of LoRA that only PEFT computes",
        "train plain LoRA, or merge the adapter into the base model",
        {
            "vllm": (_WRONG, "does not read the field and computes plain LoRA"),
            "sglang": (_WRONG, "does not read the field and computes plain LoRA"),
        },
    ),
    Rule(
        "target-parameters",
        "target_parameters: adapters on bare parameters, as of fused experts",
        "target nn.Linear modules; of mixtures, the attention alone is the safest",
        {
            "vllm": (_REFUSED, "expects other keys, except for models with fused experts"),
            "sglang": (_REFUSED, "does not know such keys"),
        },
    ),
    Rule(
        "field-unknown",
        "a field that PEFT does not know",
        "take the field out",
        {"peft": (_TAKEN, "drops it with a warning")},
    ),
    Rule(
        "base-name-missing",
        "no base_model_name_or_path",
        "write the string with which the base model is served",
        {
            "peft": (_TAKEN, "AutoPeftModel cannot find the base model"),
            "vllm": (_TAKEN, "its directory resolver passes the adapter over"),
        },
    ),
)
