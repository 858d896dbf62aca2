"""``ckpt.lint`` on anything: it reports, and never fails itself."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.lint_rows import BASE_CONFIG, adapter

from ckpt.errors import ConfigError
from ckpt.lint import RULES, BaseModel, TensorForm, lint_adapter, lint_export
from ckpt.lint.config_rules import PEFT_FIELDS
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME

BASE = BaseModel.from_config(BASE_CONFIG)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
configs = st.dictionaries(st.sampled_from(sorted(PEFT_FIELDS)) | st.text(max_size=6), values)
NAMES = """
base_model model layers 0 7 self_attn q_proj v_proj qkv_proj mlp experts up_proj lora_A lora_B
lora_embedding_A default weight bias lora_magnitude_vector base_layer lm_head embed_tokens x
"""
parts = st.sampled_from(["", *NAMES.split()])
keys = st.lists(parts, min_size=1, max_size=10).map(".".join) | st.text(max_size=12)
forms = st.builds(
    TensorForm,
    st.sampled_from(["BF16", "F32", "F64", "I32", "F8_E5M2", "BOOL", "??"]),
    st.lists(st.integers(0, 70), max_size=4).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(configs, st.dictionaries(keys, forms, max_size=6), st.booleans())
@example({"modules_to_save": 3}, {"a.weight": TensorForm("F32", (1,))}, False)
@example({"modules_to_save": "abc"}, {"a.weight": TensorForm("F32", (1,))}, False)
def test_any_configuration_and_any_keys(config, tensors, known):
    for one in lint_export(config, tensors, base=BASE if known else None):
        assert one.code in RULES
        assert one.count >= 1


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200) | configs.map(lambda c: json.dumps(c).encode()), st.data())
def test_any_bytes(config, data):
    with tempfile.TemporaryDirectory() as folder:
        directory = adapter().write(Path(folder) / "adapter")
        whole = bytearray((directory / WEIGHTS_NAME).read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
            whole[place] ^= data.draw(st.integers(1, 255))
        (directory / WEIGHTS_NAME).write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        (directory / CONFIG_NAME).write_bytes(config)
        lint_adapter(directory, base=BASE)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(BASE_CONFIG)) | st.text(max_size=5), values))
def test_any_base(config):
    try:
        base = BaseModel.from_config(config)
    except ConfigError:
        return
    made = adapter()
    forms = {key: TensorForm("F32", tuple(t.shape)) for key, t in made.tensors.items()}
    lint_export(made.config, forms, base=base)
