"""Old import path of small helpers; entries grouped by the room that has them now."""

from library.porch import porch

NAMES = {
    # options
    "add_logging_arguments": "library.options.groups:add_logging_arguments",
    "setup_logging": "library.options.porch_adapters:setup_logging",
    # runtime
    "str_to_dtype": "library.runtime.porch_adapters:str_to_dtype",
    # data
    "pil_resize": "library.data.classic:pil_resize",
    "resize_image": "library.data.classic:resize_image",
    # training
    "fire_in_thread": "library.training.classic_training:fire_in_thread",
}
__getattr__, __dir__ = porch(__name__, NAMES)
