"""A loaded model with its adapters, as training and evaluation see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qpref import dropout
from qpref.attention.layout import current, laid_out
from qpref.errors import DeviceMemoryError
from qpref.policy.adapter import is_trained
from qpref.policy.experts import packed_names
from qpref.policy.experts_lora import ExpertsLora
from qpref.policy.head import Head
from qpref.policy.passes import Pass, Passes, Wishes
from qpref.policy.rope import RopeLengths, for_lengths
from qpref.policy.rope import current as current_lengths
from qpref.policy.sharded_base import ShardedBase
from qpref.policy.token_scores import join_scores

PADDED_POSITIONS = 8
"""Rows by which a table of learned positions may exceed them: OPT's has 2 for padding."""


@dataclass(slots=True)
class Policy:
    """A model in training, or one that is only scored and sampled from.

    Attributes:
        model: the PeftModel; the plain model where there are no adapters.
        decoder: the text decoder inside it, whose output is hidden states.
        head: the frozen output head.
        device: holds all of it.
        dtype: of the base's computation.
        starts_from_adapter: a frozen copy of the start adapter is there, which is the reference.
        base_is_reference: the bare base is the reference all the same.
        own_attention: name of the attention that the model came with.
        sharing_paths: names of the attention paths that compute each prompt once, the fastest first; empty where the
            model's config rules them out.
        attention: name of the one in use.
        has_adapters: false for a plain model, which has no reference of its own.
        rope_lengths: lengths at which rotary frequencies change; None for most models.
        isolates_rows: each row is a pass of its own, since its company changes its scores.
        shards: the base's, where processes share it; None for a copy of one's own.
        passes: keeps those processes in step; None likewise.
        step_key: of the optimizer step whose dropout applies, see `seed_dropout`.
    """

    model: Any
    decoder: Any
    head: Head
    device: torch.device
    dtype: torch.dtype
    starts_from_adapter: bool
    own_attention: str
    sharing_paths: tuple[str, ...]
    attention: str
    has_adapters: bool = True
    base_is_reference: bool = False
    rope_lengths: RopeLengths | None = None
    isolates_rows: bool = False
    shards: ShardedBase | None = None
    passes: Passes | None = None
    step_key: int = 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass: LoRA's float32 weights take part in 16-bit products."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def seed_dropout(self, seed: int, step: int) -> None:
        """Have the passes from now on drop what they drop in this optimizer step of a run with this seed."""
        self.step_key = dropout.step_key(seed, step)

    def draws(self, token_keys: Callable[[], Tensor]) -> dropout.Draws:
        """Draw for the tokens of a pass, given what makes their keys: [1, T] int64 of a stream, [B, L] of rows."""
        return dropout.Draws.of(token_keys, self.step_key)

    def hidden_states(
        self, *, lengths: Sequence[Sequence[int]] | None = None, draws: dropout.Draws | None = None, **inputs: Any
    ) -> Tensor:
        """Run the decoder, the base in eval mode: whichever mode the model is in, LoRA's dropout alone is random.

        Args:
            lengths: length of the sequence that a token belongs to, [1, T] of a stream or [B, 1] of rows; None for the
                largest position's.
            draws: of its tokens, for dropout.
            inputs: of the decoder, but for a cache.

        Returns:
            [batch, length, hidden] last hidden states.
        """
        self._keep_base_in_eval()
        chosen = None
        if self.rope_lengths is not None and lengths is not None:
            chosen = self.rope_lengths.choose(lengths, self.device)
        with self._recomputing(), for_lengths(chosen), dropout.drawing(draws):
            hidden: Tensor = self.decoder(use_cache=False, **inputs).last_hidden_state
        if self.passes is not None and hidden.requires_grad:
            hidden.register_hook(self._begin_backward)
        return hidden

    def _begin_backward(self, _: Tensor) -> None:
        assert self.passes is not None
        self.passes.begin(Pass.BACKWARD)

    def share_base(self, shards: ShardedBase) -> None:
        """Compute with a base that processes share, after the adapters are on it."""
        shards.order_gathering()
        passes = Passes(world=shards.world, join=self._join)

        def begin(*_: Any) -> None:
            passes.begin(Pass.DECODER)

        self.decoder.register_forward_pre_hook(begin, prepend=True)
        self.plain_model.get_output_embeddings().passes = passes
        self.shards, self.passes, self.head = shards, passes, replace(self.head, passes=passes)

    def _join(self, kind: Pass, wishes: Wishes) -> None:
        """Take part in other processes' pass of a kind, with no tokens."""
        assert self.shards is not None
        if kind is Pass.SCORES:
            join_scores(self.head, wishes)
        elif kind is Pass.LOGITS:
            self.plain_model.get_output_embeddings().logits(self.head.weight.new_empty(0, self.head.weight.shape[1]))
        else:
            self.shards.join(backward=kind is Pass.BACKWARD)

    def finish_passes(self) -> None:
        """Join the passes of processes that have more of them; to be called before any other collective.

        Nothing happens where each process has a base of its own.
        """
        if self.passes is not None:
            self.passes.finish()

    def refuse_repeating(self, work: str, hint: str) -> None:
        """Refuse to repeat what ran out of memory where processes share the base: the others wait in the middle of a
        pass, which this one can't repeat alone.

        Raises:
            DeviceMemoryError: they share it.
        """
        if self.shards is not None:
            raise DeviceMemoryError(
                f"the device ran out of memory {work}; processes that share a base can't repeat it with fewer tokens",
                hint,
            )

    def verify_base(self) -> None:
        """Compare a shared base with what it was when it was loaded; all processes have to call it at once.

        Raises:
            PolicyError: a weight has changed.
        """
        if self.shards is not None:
            self.finish_passes()
            self.shards.verify()

    def train_without_dropout(self) -> None:
        """Switch to training mode as in a step, layers recomputed, but with LoRA's dropout off as well."""
        self.model.train()
        self.decoder.eval()
        if self.head.adapted is not None:
            self.head.adapted.eval()

    def _keep_base_in_eval(self) -> None:
        """Put the base back in eval mode after a call of the model's `train`, but leave LoRA's dropout on.

        In training mode a base may drop values, attention weights or whole layers, and add noise to its routers, under
        settings of any name; the modules' mode is what all of these read.
        """
        if not self.decoder.training:
            return
        self.decoder.eval()
        for module in self.decoder.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout.train()

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Have the recomputed layers checkpoint inside, for which transformers asks that they are in training mode."""
        layers = self._layers() if self.model.training and torch.is_grad_enabled() else []
        for layer in layers:
            layer.training = layer.gradient_checkpointing
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained adapter's tensors by name, in a fixed order."""
        return {name: value for name, value in self.model.named_parameters() if is_trained(name)}

    @property
    def shares_prompts(self) -> bool:
        """True where a batch is one stream with each prompt once, false where it is one row for each branch."""
        return self.attention != self.own_attention

    def share_prompts(self, shared: bool) -> None:
        """Compute each prompt once, by the fastest path; or fall back to whole rows under the model's own attention."""
        self.use_attention(self.sharing_paths[0] if shared else self.own_attention)

    def use_attention(self, name: str) -> None:
        """Switch to one of the sharing paths, or to the model's own attention."""
        self.decoder.set_attn_implementation(name)
        self.attention = name

    def learned_positions(self) -> int | None:
        """Rows of the decoder's table of learned positions; None for a model that computes positions."""
        limit = getattr(self.decoder.config, "max_position_embeddings", None)
        tokens = self.plain_model.get_input_embeddings()
        tables = [m for m in self.decoder.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
        has_table = limit is not None and any(limit <= m.num_embeddings <= limit + PADDED_POSITIONS for m in tables)
        return limit if has_table else None

    @property
    def plain_model(self) -> Any:
        """transformers' own model; adapters that are on take part in it."""
        return self.model.get_base_model() if self.has_adapters else self.model

    @property
    def num_layers(self) -> int:
        """Decoder layers whose activations can be recomputed."""
        return len(self._layers())

    @property
    def recomputed_layers(self) -> int:
        """Decoder layers whose activations are recomputed in the backward pass."""
        return sum(layer.gradient_checkpointing for layer in self._layers())

    def recompute_layers(self, count: int) -> None:
        """Recompute the first `count` decoder layers' activations in the backward pass; the others keep theirs."""
        for index, layer in enumerate(self._layers()):
            layer.gradient_checkpointing = index < count
            layer._gradient_checkpointing_func = partial(
                checkpoint, use_reentrant=False, context_fn=partial(_contexts, layer)
            )

    def _layers(self) -> list[Any]:
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.decoder.modules() if isinstance(module, GradientCheckpointingLayer)]

    def quantized_modules(self) -> list[str]:
        """Names, as in the base model, of the decoder's layers with 4-bit weights."""
        from bitsandbytes.nn import Linear4bit

        inside = {id(module) for module in self.decoder.modules() if isinstance(module, Linear4bit)}
        names = [name for name, module in self.model.named_modules() if id(module) in inside]
        return [name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in names]

    def packed_experts(self) -> list[str]:
        """Names, as in the base model, of the decoder's fused experts in 4 bits, one for each projection of a layer."""
        return packed_names(self.model)

    def adapts_experts(self) -> bool:
        """Return whether fused experts have adapters, so that they are computed by qpref even where they aren't
        packed."""
        return any(isinstance(module, ExpertsLora) for module in self.decoder.modules())


def _contexts(layer: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Make the contexts of a checkpointed layer's forward pass and of its recomputation, when it is in eval mode.

    The recomputation sees the layout, the lengths and the draws of the pass that it repeats: another stream may be the
    current one by then, and on a GPU it runs in another thread.
    """
    repeated = _repeated(laid_out(current()), for_lengths(current_lengths()), dropout.drawing(dropout.current()))
    return _in_eval_mode(layer), repeated


@contextmanager
def _repeated(layout: laid_out, lengths: for_lengths, draws: dropout.drawing) -> Iterator[None]:
    with layout, lengths, draws:
        yield


@contextmanager
def _in_eval_mode(layer: Any) -> Iterator[None]:
    """Hide the layer's training mode from its own forward pass."""
    layer.training = False
    try:
        yield
    finally:
        layer.training = True
