"""The decoder (GPT-2 and Llama families), its named sites, shapes, counts and initialisation.

In: a `model` section and batches of tokens. Out: losses through the head, or hidden states and logits. Read decoder.py
first; sites.py names the places that other rooms replace or switch.
"""

from .attention import KeyValueCache
from .build import build_decoder, initialise_masters
from .config import LossSection, ModelSection, RopeScalingSection
from .counts import ParameterCounts, count_parameters, flops_per_token
from .decoder import Decoder
from .norm_states import NormStates, SiteState, ordinary_tokens
from .shapes import SHAPES
from .sites import NormSite, Tap, norm_sites, spliced, tap_sites

__all__ = [
    "SHAPES",
    "Decoder",
    "KeyValueCache",
    "LossSection",
    "ModelSection",
    "NormSite",
    "NormStates",
    "ParameterCounts",
    "RopeScalingSection",
    "SiteState",
    "Tap",
    "build_decoder",
    "count_parameters",
    "flops_per_token",
    "initialise_masters",
    "norm_sites",
    "ordinary_tokens",
    "spliced",
    "tap_sites",
]
