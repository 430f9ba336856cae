"""Old import path of the ModelSpec texts."""

from library.porch import porch

_HERE = "library.models.modelspec"
_NAMES = """
    ADAPTER_LORA ADAPTER_TEXTUAL_INVERSION ARCH_SD_V1 ARCH_SD_V2_512 ARCH_SD_V2_768_V ARCH_SD_XL_V1_BASE
    BASE_METADATA IMPL_DIFFUSERS IMPL_STABILITY_AI MODELSPEC_TITLE PRED_TYPE_EPSILON PRED_TYPE_V
    build_merged_from build_metadata get_title load_metadata_from_safetensors
"""
NAMES = {name: f"{_HERE}:{name}" for name in _NAMES.split()} | {
    "load_bytes_in_safetensors": "library.models.hashes:load_bytes_in_safetensors",
    "precalculate_safetensors_hashes": "library.models.hashes:hash_of_tensors",
    "update_hash_sha256": "library.models.hashes:update_hash_sha256",
}
__getattr__, __dir__ = porch(__name__, NAMES)
