"""Score completions of models with linear attention by repeating the prompt for each completion.

These models cannot backpropagate through their cache, so completions cannot share an encoded prompt.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Prompts(NamedTuple):
    """Hold the processor's output for B prompts; used in place of virft.Prefix."""

    inputs: dict[str, Tensor]

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the logits [B * G, C, V] of completions ids [B * G, C], from one forward over G copies of each prompt.

        The whole batch is concatenated G times instead of repeating each row, so that the images stay in the order of
        their prompts, whatever shape the processor gave them.
        """
        B, P = self.inputs["input_ids"].shape
        G, C, sequence = len(ids) // B, ids.shape[1], {}
        # [G * B]: the row of `ids` for each row of the concatenated copies
        row = torch.arange(B * G, device=ids.device).view(B, G).T.flatten()
        for name, x in self.inputs.items():
            sequence[name] = torch.cat([x] * G)
            if x.shape[:2] == (B, P):  # one value per token: completion tokens get that of the prompt's last token
                sequence[name] = torch.cat([sequence[name], sequence[name][:, -1:].repeat_interleave(C, 1)], 1)
        sequence["input_ids"][:, P:] = ids[row]
        # No position_ids: padding shifts all positions of a row equally, and rotary attention depends on differences.
        logits = model(**sequence, use_cache=False, logits_to_keep=C + 1).logits[:, :-1]
        return logits[row.argsort()]
