"""LoRA on fused experts, in PEFT's format for `target_parameters`: which parameters, and PEFT's wrappers around them.

PEFT adds an adapter's product to a parameter itself, so it needs all experts dense. Here PEFT's wrapper holds the
adapter, so that names, saving and switching off are PEFT's, and `experts_forward` computes it, token by token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from qpref.errors import PolicyError
from qpref.policy.architecture import text_modules
from qpref.policy.experts import PackedExperts, fused_experts, projections_of, unpacked_weights
from qpref.policy.experts_forward import Adapters, compute_here
from qpref.policy.grouped_product import ExpertAdapter
from qpref.policy.peft_limits import cannot_read, misread_by_peft
from qpref.policy.targets import matches


class ExpertsLora(ParamWrapper):  # type: ignore[misc]  # PEFT's is untyped
    """PEFT's adapters on one projection of fused experts, frozen weights packed or not."""

    def forward(self, *args: Any, adapters: Adapters | None = None, **keywords: Any) -> Tensor:
        """Compute the experts, with this adapter and those of the wrappers outside; a merged one is in the weights."""
        adapters = {**(adapters or {}), self.parameter_name: self._active()}
        compute = super().forward if self.merged else self.base_layer
        result: Tensor = compute(*args, adapters=adapters, **keywords)
        return result

    def get_param(self) -> Tensor:
        weights: Tensor | PackedExperts = super().get_param()
        return weights.stand_in if isinstance(weights, PackedExperts) else weights

    def _active(self) -> ExpertAdapter | None:
        """Return the adapter that is on; None where none is."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return None
        assert len(names) == 1
        return ExpertAdapter(self.lora_A[names[0]].weight, self.lora_B[names[0]].weight, self.scaling[names[0]])


def expert_parameters(model: Any) -> list[str]:
    """Name the projections of the text decoder's fused experts, as parameters of the plain model."""
    text = text_modules(model)
    modules = [(name, module) for name, module in fused_experts(model).items() if name in text]
    return [f"{name}.{projection}" for name, module in modules for projection in projections_of(module)]


def adaptable_experts(model: Any) -> list[str]:
    """Name the parameters that [adapter] `experts` means, as `expert_parameters` does.

    Raises:
        PolicyError: the model has no fused experts, or PEFT wouldn't find their adapters again.
    """
    found, kind, text = expert_parameters(model), model.config.model_type, text_modules(model)
    layers = {name.rpartition(".")[0] for name in found}
    if found and not misread_by_peft(model, [*layers, *(f"{layer}.base_layer" for layer in layers)]):
        return found
    if found:
        what = cannot_read(model.config, layers)
    elif unpacked_weights(model, text):
        what = f"the experts of this {kind} model aren't computed by transformers' common expert functions"
    elif any("experts." in name for name in text):
        what = f"the experts of this {kind} model are linear layers, which [adapter] targets adapts"
    else:
        what = f"this {kind} model has no experts"
    raise PolicyError(f"[adapter] experts: {what}", "leave [adapter] experts out")


def matching_experts(model: Any, targets: Iterable[str]) -> list[str]:
    """Name the parameters that the `target_parameters` of an adapter's settings mean in a plain model.

    Raises:
        PolicyError: one of them means none of the fused experts'.
    """
    known, targets = expert_parameters(model), list(targets)
    for target in targets:
        if not any(matches(name, target) for name in known):
            raise PolicyError(f"the adapter's target parameter {target} is no projection of this model's fused experts")
    return [name for name in known if any(matches(name, target) for target in targets)]


def peft_target_parameters(model: Any, parameters: Collection[str]) -> list[str]:
    """Name parameters of a plain model for PEFT: by their last two parts where those match no other, else in full."""
    endings = {".".join(name.split(".")[-2:]) for name in parameters}
    known = (
        f"{name}.{own}" for name, module in model.named_modules() for own in {**module._parameters, **module._modules}
    )
    matching = {name for name in known if any(matches(name, ending) for ending in endings)}
    return sorted(endings if matching == set(parameters) else parameters)


def add_to_experts(model: nn.Module, parameters: Iterable[str], config: Any, adapter_name: str) -> None:
    """Add an adapter to projections of fused experts, in the order in which PEFT nests its wrappers.

    Args:
        model: the plain model, with or without adapters.
        parameters: their names in the plain model.
        config: PEFT's; its rank and alpha patterns may name the parameters.

    Raises:
        ValueError: PEFT has no such adapter on a parameter.
    """
    for name in parameters:
        path, _, projection = name.rpartition(".")
        parent_path, _, own = path.rpartition(".")
        parent, outer = model.get_submodule(parent_path), model.get_submodule(path)
        wrappers = list(_wrappers(outer))
        existing = next((each for each in wrappers if each.parameter_name == projection), None)
        sizes = {
            "r": config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r),
            "lora_alpha": config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha),
        }
        if existing is not None:
            existing.update_layer(adapter_name, config=config, **sizes)
        else:
            compute_here(wrappers[-1].base_layer if wrappers else outer)
            setattr(parent, own, ExpertsLora(outer, adapter_name, parameter_name=projection, config=config, **sizes))


def _wrappers(module: nn.Module) -> Iterator[ExpertsLora]:
    """Yield the wrappers around a module with experts, the outermost first."""
    while isinstance(module, ExpertsLora):
        yield module
        module = module.base_layer
