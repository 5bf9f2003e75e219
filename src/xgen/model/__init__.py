"""The decoder: LLaMA's shape with XGen's vocabulary, as pure functions over a pytree of weights.

Axis letters, the same in signatures, einsums and the weights table:

    B  sequences of a batch          D  hidden size ("embed")     E  size of one head
    S  positions of a sequence       F  mlp size                  L  layers, stacked and scanned
    T  tokens, B x S flattened       H  query heads               V  vocabulary rows, padding included
    G  query heads a key head serves K  key and value heads       N  any output axes, flattened
    P  rotary planes of a head, E/2  R  rows of attention, B x K  Q  queries of a block
    M  keys up to a block's end      C  tokens of a chunk
"""

from xgen.model.decoder import forward, last_logits, logits, nll, objective
from xgen.model.flops import flops_per_token
from xgen.model.spec import Spec
from xgen.model.weights import WEIGHTS, Weights, abstract, as_dict, from_dict, initialise, parameter_count

__all__ = [
    "WEIGHTS",
    "Spec",
    "Weights",
    "abstract",
    "as_dict",
    "flops_per_token",
    "forward",
    "from_dict",
    "initialise",
    "last_logits",
    "logits",
    "nll",
    "objective",
    "parameter_count",
]
