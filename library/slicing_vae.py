"""Old import path of the VAE that works in slices."""

from library.porch import porch

NAMES = {"SlicingAutoencoderKL": "library.models.porch_slicing_vae:SlicingAutoencoderKL"}
__getattr__, __dir__ = porch(__name__, NAMES)
