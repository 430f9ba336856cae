"""Old import path of uploads and of files on the hub."""

from library.porch import porch

NAMES = {
    # training
    "exists_repo": "library.training.hub:exists_repo",
    "list_dir": "library.training.hub:list_dir",
    "upload": "library.training.classic_training:upload",
}
__getattr__, __dir__ = porch(__name__, NAMES)
