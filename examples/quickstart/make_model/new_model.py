"""Puts the trained VAE together with an untrained U-Net and text encoder: a diffusers folder to train from.

    python examples/quickstart/make_model/new_model.py --vae vae/vae --output untrained

Text: CLIP's vocabulary, 2 layers of width 64. Its token table starts at standard deviation 1: with CLIP's
0.02 so small an encoder takes ten times as long to tell colours apart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from transformers import CLIPTextConfig

from library.models.clip_text_model import CLIPTextModel
from library.models.dimensions import TextDimensions
from library.models.family import LoadedModel, family
from library.models.text_encoders import text_config
from library.models.unet_sd import UNet2DConditionModel

WIDTH = 64


def new_unet() -> torch.nn.Module:
    """3.3 million parameters; several channels a norm group, as a narrow model needs."""
    return UNet2DConditionModel(
        sample_size=8,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        block_out_channels=(32, 64, 64, 64),
        norm_num_groups=16,
    )


def new_text_encoder() -> torch.nn.Module:
    config = text_config(TextDimensions(width=WIDTH, layers=2, intermediate=4 * WIDTH))
    encoder = CLIPTextModel(CLIPTextConfig(**config))
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    sd = family("sd")
    model = LoadedModel(
        text_encoders=[new_text_encoder()],
        vae=AutoencoderKL.from_pretrained(args.vae),
        unet=new_unet(),
        tokenizers=sd.load_tokenizers(v2=False, cache_dir=None, max_token_length=None),
        version="sd_v1",
        is_stability_layout=False,
    )
    sd.save(model, args.output, stability_layout=False)


if __name__ == "__main__":
    main()
