"""Old import path of the set-up for Intel XPUs, which torch itself supports now."""

from library.porch import porch

NAMES = {"ipex_init": "library.runtime.porch_adapters:ipex_init"}
__getattr__, __dir__ = porch(__name__, NAMES)
