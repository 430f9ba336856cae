"""transformers' CLIP text model with the module names that files and networks use, whatever the version.

transformers 5 dropped the level `text_model` from `CLIPTextModel`; here it is put back, so that key names
(`text_model.encoder...`) and adapter names (`lora_te_text_model_encoder...`) do not depend on the version.
Importing this module imports transformers; `text_encoders` does it when it needs to.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import CLIPTextConfig


def _lacks_level() -> bool:
    """Whether the installed `CLIPTextModel` has its layers directly below it."""
    with torch.device("meta"):
        tiny = CLIPTextConfig(hidden_size=2, intermediate_size=2, num_hidden_layers=0, num_attention_heads=1)
        return not hasattr(transformers.CLIPTextModel(tiny), "text_model")


if _lacks_level():
    from transformers.models.clip.modeling_clip import CLIPPreTrainedModel

    class CLIPTextModel(CLIPPreTrainedModel):
        """A text encoder: token ids (B, L) -> `last_hidden_state` (B, L, D), on request all `hidden_states`."""

        config_class = CLIPTextConfig
        base_model_prefix = "text_model"
        main_input_name = "input_ids"

        def __init__(self, config: CLIPTextConfig) -> None:
            super().__init__(config)
            self.text_model = transformers.CLIPTextModel._from_config(config)
            self.post_init()

        @classmethod
        def around(cls, bare: transformers.CLIPTextModel) -> CLIPTextModel:
            """The same weights behind the level `text_model`."""
            with torch.device("meta"):
                model = cls(bare.config)
            model.text_model = bare
            return model

        def get_input_embeddings(self) -> nn.Module:
            return self.text_model.embeddings.token_embedding

        def set_input_embeddings(self, value: nn.Module) -> None:
            self.text_model.embeddings.token_embedding = value

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.text_model(*args, **kwargs)

else:
    CLIPTextModel = transformers.CLIPTextModel
