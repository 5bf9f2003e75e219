"""How far from exact are two float32 programs of one model: ours, and transformers'?

    python benchmarks/float64_truth.py FOLDER TEXT [TOKENS]

FOLDER is a Hugging Face folder (`xgen convert hf` writes one), TEXT a file whose ids are repeated up to TOKENS (8,000).
The exact logits are transformers' in float64, with the rotary angles that both take in float32. Wants the extra
`oracle`; 8,000 tokens of SmolLM2-135M take about four minutes and 12 GiB on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import xgen

ROWS = 500


def main(folder: str, text: Path, tokens: int) -> None:
    ours = xgen.load(folder)
    assert ours.tokenizer is not None
    once = ours.tokenizer.encode(text.read_text(encoding="utf-8"))
    ids = np.array([(once * (tokens // len(once) + 1))[:tokens]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits[0].numpy()
        states = model.double().model(torch.tensor(ids)).last_hidden_state[0]
    mine = np.asarray(ours.logits(ids))[0]
    largest = np.zeros(3)
    for row in range(0, tokens, ROWS):
        part = slice(row, row + ROWS)
        with torch.no_grad():
            exact = (states[part] @ model.lm_head.weight.T).numpy()
        pairs = ((mine[part], exact), (theirs[part], exact), (mine[part], theirs[part]))
        largest = np.maximum(largest, [np.abs(one - other).max() for one, other in pairs])
    print("largest difference of a logit: ours {:.2e}, transformers {:.2e}, to each other {:.2e}".format(*largest))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 8000)
