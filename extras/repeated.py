"""Score completions of models with linear attention, whose cache carries no gradients: repeat the prompt for each one."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Prompts(NamedTuple):
    """B prompts as a processor made them, in place of virft.Prefix."""

    inputs: dict[str, Tensor]

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the logits [B * G, C, V] of completions ids [B * G, C], from one forward over G copies of each prompt.

        The whole batch is copied G times, one copy after the other: only then do the images come in the order of their
        prompts, whatever the shape that a processor gave them.
        """
        B, P = self.inputs["input_ids"].shape
        G, C, sequence = len(ids) // B, ids.shape[1], {}
        row = torch.arange(B * G, device=ids.device).view(B, G).T.flatten()  # [G * B], copy by copy
        for name, x in self.inputs.items():
            sequence[name] = torch.cat([x] * G)
            if x.shape[:2] == (B, P):  # a value per token: completions get that of the prompt's last
                sequence[name] = torch.cat([sequence[name], sequence[name][:, -1:].repeat_interleave(C, 1)], 1)
        sequence["input_ids"][:, P:] = ids[row]
        # No position ids: in one forward padding shifts a whole row alike, and rotary attention depends on differences.
        logits = model(**sequence, use_cache=False, logits_to_keep=C + 1).logits[:, :-1]
        return logits[row.argsort()]
