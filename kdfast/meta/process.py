"""The learning process: what the pathway weights were at every step of a search, to be followed again."""

import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FORMAT = "kdfast process 1"


class ProcessStep(NamedTuple):
    """The weights of one step.

    Attributes:
        weights: normalised, [pathways].
        raw: the learned parameters behind them, [pathways]; pathways are dropped by these.
    """

    weights: Tensor
    raw: Tensor


class Process:
    """A record of pathway weights, one row a step.

    Args:
        pathways: the pathways' names, in the order of the weights.

    Attributes:
        weights: normalised weights [steps, pathways], float32 on the CPU.
        raw: the parameters behind them, [steps, pathways].

    Source: Deng et al., "DistPro", ECCV 2022 (arXiv:2204.05547), section 3.4: a process learned in a short
    search is stretched over the long training.

    Example:
        >>> process = Process(["a", "b"])
        >>> process.record(torch.tensor([0.2, 0.4]), torch.tensor([1.0, 1.7]))
        >>> process.record(torch.tensor([0.4, 0.4]), torch.tensor([1.7, 1.7]))
        >>> process.resample(3).weights[:, 0]
        tensor([0.2000, 0.3000, 0.4000])
    """

    def __init__(self, pathways: Sequence[str]):
        self.pathways = list(pathways)
        empty = torch.empty(0, len(self.pathways))
        self._stored = ProcessStep(empty, empty)
        self._recorded: list[ProcessStep] = []  # on their device until someone looks, so that no step waits for it

    def record(
        self,
        weights: Tensor,  # [pathways]
        raw: Tensor,  # [pathways]
    ) -> None:
        """Add a step."""
        for name, x in (("weights", weights), ("raw", raw)):
            if x.shape != (len(self.pathways),):
                raise ValueError(f"{name} must be [{len(self.pathways)}], one a pathway, got {list(x.shape)}.")
        self._recorded.append(ProcessStep(weights.detach().clone(), raw.detach().clone()))

    def __len__(self) -> int:
        return len(self._stored.weights) + len(self._recorded)

    @property
    def weights(self) -> Tensor:  # [steps, pathways]
        return self._gather().weights

    @property
    def raw(self) -> Tensor:  # [steps, pathways]
        return self._gather().raw

    def at(self, step: int) -> ProcessStep:
        """The weights of a step, counted from 0.

        Raises:
            ValueError: past the last step; `resample` stretches a process to the steps there are.
        """
        if not 0 <= step < len(self):
            raise ValueError(
                f"step must be in [0, {len(self)}), the steps of this process, got {step}; use "
                "process.resample(steps) to stretch it over a longer training."
            )
        stored = self._gather()
        return ProcessStep(stored.weights[step], stored.raw[step])

    def resample(self, steps: int) -> "Process":
        """The same process in `steps` steps: first and last are kept, between them it is linear in time.

        The normalised weights and the parameters behind them are interpolated each on its own.
        """
        if steps < 1 or not len(self):
            raise ValueError(f"A process of {len(self)} steps cannot be resampled to {steps}; both must be at least 1.")
        position = torch.linspace(0, len(self) - 1, steps, dtype=torch.float64)
        below = position.floor().long()
        above = (below + 1).clamp(max=len(self) - 1)
        share = (position - below).float().unsqueeze(1)
        process = Process(self.pathways)
        process._stored = ProcessStep(*(torch.lerp(x[below], x[above], share) for x in self._gather()))
        return process

    def dropped_share(self, clip: float) -> float:
        """The share of all pathway evaluations a training would save that drops those whose raw weight is <= clip."""
        if not len(self):
            raise ValueError("An empty process drops nothing; record at least one step.")
        return (self.raw <= clip).double().mean().item()

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file: the tensors `weights` and `raw`, and the pathways' names as metadata."""
        from safetensors.torch import save_file

        tensors = {name: x.contiguous() for name, x in self._gather()._asdict().items()}
        save_file(tensors, path, {"format": FORMAT, "pathways": json.dumps(self.pathways)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Process":
        """Read what `save` wrote.

        Raises:
            ValueError: for a safetensors file of something else.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} must be a file of Process.save, got format {metadata.get('format')!r}.")
            process = cls(json.loads(metadata["pathways"]))
            process._stored = ProcessStep(file.get_tensor("weights"), file.get_tensor("raw"))
        return process

    def _gather(self) -> ProcessStep:
        if self._recorded:
            added = (torch.stack(rows).float().cpu() for rows in zip(*self._recorded, strict=True))
            self._stored = ProcessStep(*(torch.cat(pair) for pair in zip(self._stored, added, strict=True)))
            self._recorded = []
        return self._stored
