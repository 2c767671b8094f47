"""The keys that transformers' own classes know, and their defaults: what models/known_keys.json is made of.

python tests/known_keys.py > models/known_keys.json
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any

from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

FAMILIES = {
    "llava": (LlavaConfig, LlavaImageProcessorPil),
    "llava_next": (LlavaNextConfig, LlavaNextImageProcessorPil),
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLImageProcessorPil),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2VLImageProcessorPil),
    "qwen3_vl": (Qwen3VLConfig, Qwen2VLImageProcessorPil),
    "qwen3_5": (Qwen3_5Config, Qwen2VLImageProcessorPil),
}
# models of which families of several parts take one as a section, by its model_type
PARTS = {
    "clip_vision_model": CLIPVisionConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
}


def known_keys() -> dict[str, Any]:
    """``every_section``: of the base class; ``generation``: what it leaves to generation_config.json; then families."""
    sources = (PreTrainedConfig.__post_init__, PreTrainedConfig.convert_rope_params_to_dict)
    taken = {
        name for source in sources for name in re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(source))
    }
    base = {field.name: _plain(field.default) for field in dataclasses.fields(PreTrainedConfig)}
    found: dict[str, Any] = {
        "every_section": base | dict.fromkeys(sorted(taken - set(base))),
        "generation": sorted(GenerationConfig._get_default_generation_params()),
    }
    for family, (config, processor) in FAMILIES.items():
        sections = {"config.json": config} | {
            name: spec.config_class
            for name, spec in _sections(config).items()
            if dataclasses.is_dataclass(spec.config_class)  # not one that its model_type chooses
        }
        found[family] = {name: _own_fields(section, base) for name, section in sections.items()}
        kwargs = processor.valid_kwargs.__annotations__
        found[family]["preprocessor_config.json"] = {
            name: _plain(getattr(processor, name, None)) for name in sorted(kwargs)
        }
    for name, config in PARTS.items():
        found[name] = {"config.json": _own_fields(config, base)}
    return found


def _sections(config: type) -> dict[str, Any]:
    found: dict[str, Any] = config.sub_configs_defaults
    return found


def _own_fields(config: type, base: dict[str, Any]) -> dict[str, Any]:
    """Fields and their defaults, other names of fields, and the base of rotary frequencies."""
    fields = {f.name: _plain(f.default) for f in dataclasses.fields(config) if f.name not in base}
    if "rope_parameters" in fields:
        fields["rope_theta"] = config.default_theta
    return fields | dict.fromkeys(sorted(config.attribute_map))


def _plain(value: Any) -> Any:
    return None if value is dataclasses.MISSING else json.loads(json.dumps(value))


if __name__ == "__main__":
    print(json.dumps(known_keys(), indent=1, sort_keys=True))
