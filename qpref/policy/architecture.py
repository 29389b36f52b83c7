"""The class of a checkpoint, and the text decoder inside a model of any class, multimodal ones included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qpref.errors import PolicyError
from qpref.policy.foreign_files import read_by_library


def model_class(config: Any, origin: object) -> Any:
    """Choose the class to load a checkpoint by: its own, which config.json names, else AutoModelForCausalLM's.

    A multimodal checkpoint is loaded by its own class although its text is all that is trained: everybody who serves
    it loads that class, so the adapter's names have to be its names.

    Args:
        config: the checkpoint's, as transformers reads it.
        origin: of the config, for the message.

    Raises:
        PolicyError: transformers has no class for it that generates text from text.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

    if getattr(config, "is_encoder_decoder", False):
        raise PolicyError(f"{origin}: {config.model_type} is an encoder-decoder model; qpref trains decoders alone")
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and _generates(kind, config):
            return kind
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise PolicyError(f"{origin}: transformers has no causal language model of the type {config.model_type}")


def empty_model(config: Any, origin: object) -> Any:
    """Build a checkpoint's model on the meta device, without weights.

    Raises:
        PolicyError: as for `model_class`, or transformers can't build it.
    """
    import torch

    kind = model_class(config, origin)
    with read_by_library(origin, "transformers can't build this model"), torch.device("meta"):
        return kind(config)


def text_decoder(model: Any) -> Any:
    """Find the text decoder of a causal language model, whose output is hidden states.

    It is transformers' own choice where that holds the input embeddings and not the head (Llama 4's holds both), else
    the innermost model that holds the embeddings.
    """
    from transformers import PreTrainedModel

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    holders = [each for each in models if any(part is embeddings for part in each.modules())]
    own = model.get_decoder()
    is_decoder = any(each is own for each in holders) and not any(part is head for part in own.modules())
    return own if is_decoder else holders[-1]


def decoder_layers(model: Any) -> list[Any]:
    """List the decoder's layers: those whose activations transformers can recompute, else the modules of the longest
    list in it."""
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = list(text_decoder(model).modules())
    layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    lists = [list(module) for module in modules if isinstance(module, nn.ModuleList)]
    return layers or max(lists, key=len, default=[])


def causal_model(model: Any) -> Any:
    """Find the innermost model with both the input embeddings and the output head: it computes a text's logits."""
    from transformers import PreTrainedModel

    wanted = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [each for each in models if wanted <= {id(part) for part in each.modules()}][-1]


def layers_after_decoder(model: Any) -> list[str]:
    """Names of the outermost modules that change a text's hidden states between the decoder and the output head."""
    known = {id(module) for module in text_decoder(model).modules()} | {id(model.get_output_embeddings())}
    found: list[str] = []
    for name, module in causal_model(model).named_modules():
        is_other = not any(id(part) in known for part in module.modules()) and any(True for _ in module.parameters())
        if is_other and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def text_modules(model: Any) -> set[str]:
    """Names of the modules that compute a text's logits: the decoder with all inside it, and the output head."""
    decoder, head = text_decoder(model), model.get_output_embeddings()
    inside = {id(module) for module in decoder.modules()} | {id(head)}
    return {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in inside}


def shared_layers(model: Any, layers: Iterable[str]) -> list[str]:
    """Name those of the layers whose weights are other layers' too, as Zamba's attention blocks are."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    shared = tied.keys() | set(tied.values())
    return [layer for layer in layers if f"{layer}.weight" in shared]


def other_modules(model: Any) -> set[str]:
    """Names of the outermost modules that take no part in a text's logits, such as a vision tower."""
    text = text_modules(model)
    holding_text = {name.rsplit(".", cut)[0] for name in text for cut in range(1, name.count(".") + 1)} | {""}
    others = {name for name, _ in model.named_modules() if name not in text | holding_text}
    return {name for name in others if name.rpartition(".")[0] in holding_text}


def _generates(kind: Any, config: Any) -> bool:
    return isinstance(config, kind.config_class) and kind.can_generate()
