"""Old import path of device helpers."""

from library.porch import porch

NAMES = {
    "HAS_CUDA": "library.runtime.porch_adapters:HAS_CUDA",
    "HAS_MPS": "library.runtime.porch_adapters:HAS_MPS",
    "HAS_XPU": "library.runtime.porch_adapters:HAS_XPU",
    "clean_memory": "library.runtime.devices:empty_cache",
    "clean_memory_on_device": "library.runtime.devices:empty_cache",
    "get_preferred_device": "library.runtime.devices:pick_device",
    "init_ipex": "library.runtime.porch_adapters:init_ipex",
}
__getattr__, __dir__ = porch(__name__, NAMES)
