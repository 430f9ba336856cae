"""Old import path of the sampling pipeline for SDXL."""

from library.porch import porch

NAMES = {
    "SdxlStableDiffusionLongPromptWeightingPipeline": (
        "library.generation.classic_pipeline:SdxlStableDiffusionLongPromptWeightingPipeline"
    ),
    "get_weighted_text_embeddings": "library.generation.classic_pipeline:get_weighted_text_embeddings",
    "parse_prompt_attention": "library.training.classic_text:parse_prompt_attention",
}
__getattr__, __dir__ = porch(__name__, NAMES)
