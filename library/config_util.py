"""Old import path of the data-set configuration; entries grouped by the room that has them now."""

from library.porch import porch

_CONFIG = (
    "BaseDatasetParams",
    "BaseSubsetParams",
    "Blueprint",
    "BlueprintGenerator",
    "ConfigSanitizer",
    "ControlNetDatasetParams",
    "ControlNetSubsetParams",
    "DatasetBlueprint",
    "DatasetGroupBlueprint",
    "DreamBoothDatasetParams",
    "DreamBoothSubsetParams",
    "FineTuningDatasetParams",
    "FineTuningSubsetParams",
    "SubsetBlueprint",
    "generate_controlnet_subsets_config_by_subdirs",
    "generate_dataset_group_by_blueprint",
    "generate_dreambooth_subsets_config_by_subdirs",
    "load_user_config",
)
NAMES = {
    # training: adapters over data/config
    **{name: f"library.training.classic_config:{name}" for name in _CONFIG},
    "ControlNetDataset": "library.training.classic_datasets:ControlNetDataset",
    "DreamBoothDataset": "library.training.classic_datasets:DreamBoothDataset",
    "FineTuningDataset": "library.training.classic_datasets:FineTuningDataset",
    "ControlNetSubset": "library.training.classic_subsets:ControlNetSubset",
    "DreamBoothSubset": "library.training.classic_subsets:DreamBoothSubset",
    "FineTuningSubset": "library.training.classic_subsets:FineTuningSubset",
    # options
    "add_config_arguments": "library.options.groups:add_config_arguments",
    # data
    "DatasetGroup": "library.data.group:DatasetGroup",
    # the other porch, which callers reach through this one
    "train_util": "library.train_util:",
}
__getattr__, __dir__ = porch(__name__, NAMES)
