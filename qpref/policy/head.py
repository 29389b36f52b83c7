"""The frozen output head of a model: logits of a slice of the vocabulary at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qpref.errors import PolicyError
from qpref.policy.logit_transforms import logit_transforms
from qpref.policy.matmul import float32_matmul
from qpref.policy.passes import Passes
from qpref.policy.sharded_vocabulary import ShardedHead, VocabularyRows


@dataclass(frozen=True, slots=True)
class Head:
    """A frozen output head and the transforms that the model applies to its logits.

    Attributes:
        weight: [vocabulary, width]; of this process's tokens alone where `rows` are shared.
        bias: [vocabulary], or None; likewise.
        scale: factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap); None for no cap.
        adapted: PEFT's LoRA layer around it; None for a head without an adapter.
        rows: describes the rows that processes share; None for a whole head.
        passes: keeps the processes that share rows in step.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    adapted: Any = None
    rows: VocabularyRows | None = None
    passes: Passes | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """Read the head of a causal language model. The first batch of a run compares it with the model's own logits.

        Raises:
            PolicyError: the head isn't a plain linear layer.
        """
        module = model.get_output_embeddings()
        plain = getattr(module, "base_layer", module)
        rows = plain.rows if isinstance(plain, ShardedHead) else None
        if rows is None and type(plain) is not nn.Linear:
            raise PolicyError(f"the output head is a {type(plain).__name__}; qpref needs a plain linear layer")
        scale, cap = logit_transforms(model)
        if rows is not None:
            bias = None if plain.bias is None else plain.bias[rows.start : rows.stop]
            return cls(rows.weight, bias, scale, cap, rows=rows)
        return cls(plain.weight, plain.bias, scale, cap, None if plain is module else module)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return int(self.weight.shape[0]) if self.rows is None else self.rows.num_tokens

    def low_rank(self, hidden: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Apply the first half of the head's adapter: [rows, rank] float32 scale * dropout(hidden) A^T, and its B
        [vocabulary, rank]; None for both where there is no adapter or it is off."""
        if self.adapted is None or self.adapted.disable_adapters:
            return None, None
        (name,) = self.adapted.active_adapters
        a, b = self.adapted.lora_A[name].weight, self.adapted.lora_B[name].weight
        return self.adapted.lora_dropout[name](hidden).to(a.dtype) @ a.t() * self.adapted.scaling[name], b

    def logits(
        self, hidden: Tensor, start: int, stop: int, low: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        """Compute the [rows, stop - start] logits of a vocabulary slice, accumulated and returned in float32."""
        logits = float32_matmul(hidden, self.weight[start:stop].t())
        if low is not None and b is not None:
            logits.addmm_(low.to(logits.dtype), b[start:stop].t().to(logits.dtype))
        if self.bias is not None:
            logits += self.bias[start:stop]
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def product_grad(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient of the logits into that of hidden @ weight^T, in place, by the chain rule."""
        if self.softcap is not None:
            grad *= 1 - (logits / self.softcap).square()
        return grad if self.scale == 1.0 else grad.mul_(self.scale)
