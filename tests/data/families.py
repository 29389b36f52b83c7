# ruff: noqa: RUF001
"""Chat templates of real families, each with its control tokens, over small tokenizers that are trained here.

The templates in `templates/` are written for these tests: they put what each family's own template puts around turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
KINDS = ("byte level", "metaspace")
CORPUS = (
    "What comes after two? After two comes three, and then four.",
    "user assistant system tool model the answer is the question, and the answer to the question is the weather",
    "def add(left, right):\n    return left + right\n\nprint(add(2, 3))\n\n\n# 12345 67890",
    'Grüße aus Köln! "name": "weather", "city": "Köln", {"type": "function"} 你好 世界 Привет мир 🙂',
) * 3


@dataclass(frozen=True)
class Family:
    """A family's control tokens, and what its template does.

    Attributes:
        stop: what ends a response.
        eos: the tokenizer's end-of-sequence token, where that is another one.
        others: further control tokens.
        opens, closes: what stands before and after a response's text, if it isn't the stop token alone.
    """

    name: str
    stop: str
    bos: str | None = None
    eos: str = ""
    others: tuple[str, ...] = ()
    has_system: bool = True
    has_tools: bool = False
    opens: str = ""
    closes: str = ""
    words: tuple[str, ...] = field(default=())

    @property
    def template(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_text()


FAMILIES = {
    family.name: family
    for family in (
        Family("llama3", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>",
               ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"), has_tools=True),
        Family("qwen", "<|im_end|>", others=("<|im_start|>", "<|endoftext|>"), has_tools=True,
               words=("<think>", "</think>", "<tool_call>", "</tool_call>")),
        Family("mistral", "</s>", "<s>", has_tools=True, opens=" ",
               others=("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                       "[TOOL_RESULTS]", "[/TOOL_RESULTS]")),
        Family("gemma", "<end_of_turn>", "<bos>", "<eos>", ("<start_of_turn>",), has_system=False),
        Family("phi3", "<|end|>", "<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>")),
        Family("chatml", "<|im_end|>", eos="<|endoftext|>", others=("<|im_start|>",)),
        Family("zephyr", "</s>", "<s>"),
        Family("smollm", "<|im_end|>", "<|im_start|>"),
        Family("cohere", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", closes="<|END_RESPONSE|>",
               others=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
                       "<|START_RESPONSE|>", "<|END_RESPONSE|>")),
        Family("vicuna", "</s>", "<s>"),
        Family("deepseek_r1", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>",
               others=("<｜User｜>", "<｜Assistant｜>"), words=("<think>", "</think>")),
    )
}  # fmt: skip


@cache
def _trained(kind: str) -> str:
    """A backend without special tokens, as JSON."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "byte level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        first = "always" if kind == "metaspace, always" else "first"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=first, split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        if kind == "normalizing":
            backend.normalizer = normalizers.NFKC()
        alphabet = []
    trained = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if not alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=trained, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def tokenizer_of(family: Family, kind: str = "byte level", normalized: bool = False):
    """A trained tokenizer with the family's template and control tokens.

    Args:
        kind: one of KINDS; or "metaspace, always": a space goes before each stretch; or "normalizing": with NFKC.
        normalized: whether the control tokens are looked for in the normalized text.
    """
    import json

    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    trained = json.loads(_trained(kind))
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] == "<unk>"]
    backend = Tokenizer.from_str(json.dumps(trained))
    special = dict.fromkeys(filter(None, (family.bos, family.eos, family.stop, *family.others)))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=normalized) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in family.words])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos or family.stop,
        pad_token=family.eos or family.stop,
        unk_token=None if kind == "byte level" else "<unk>",
    )
    tokenizer.chat_template = family.template
    return tokenizer
