"""Footnotes: reasons for a measured ratio that differs from the predicted one.

Each text names its evidence, and calls a guess a guess. Profile again when the code changes.
"""

from __future__ import annotations

REASONS: dict[tuple[str, str], str] = {
    ("TRL as shipped", ""): (
        "TRL as shipped: one profiled chat-like step (`python -m benchmarks.profile_step DPO`): 39 % products, "
        "25 % torch's fused attention, 21 % elementwise operations. The compacted row differs in the head alone, which "
        "here projects every row: elementwise operations take 2.6 s there against 1.6 s, products 4.8 s against 3.8 s. "
        "The prediction counts products alone. Long prompts were not profiled."
    ),
    ("TRL compacted", "chat-like"): (
        "TRL compacted: one profiled step (`python -m benchmarks.profile_step DPO`): torch's fused attention for CPUs "
        "takes 30 %, elementwise operations 17 %. The prediction counts attention's operations at the speed of the "
        "other products, and no others; qpref's attention runs as such products."
    ),
    ("TRL compacted", "long prompt"): (
        "TRL compacted: one profiled step (`python -m benchmarks.profile_step 'DPO long'`): torch's fused attention "
        "for CPUs takes 58 %, elementwise operations 9 %; see the chat-like row."
    ),
    ("TRL best tuned", "chat-like"): (
        "TRL best tuned: one profiled step (`python -m benchmarks.profile_step DPO`, or KTO): torch's fused attention "
        "for CPUs takes 36 % (29 % in KTO), elementwise operations 16 %; see the compacted row."
    ),
    ("TRL best tuned", "long prompt"): (
        "TRL best tuned: one profiled step (`python -m benchmarks.profile_step 'DPO long'`): torch's fused attention "
        "for CPUs takes 59 % (4.6 of 7.9 s; all of qpref's step takes 3.1 s), elementwise operations 10 %."
    ),
    ("without prompt sharing", ""): (
        "Without prompt sharing: whole rows go through the model's own attention, so this row is without attention in "
        "blocks too; the two rows' factors, 1.41 predicted and 1.19 measured, make 1.68."
    ),
    ("without attention in blocks", ""): (
        "Without attention in blocks: the same operations, in torch's fused attention for CPUs in float32; that it is "
        "slower is what the blocks are for."
    ),
    ("without fused LoRA", ""): (
        "Without fused LoRA: the same products; PEFT's layers clone, cast and scale activations around them, which the "
        "prediction doesn't count. Not profiled."
    ),
}
"""(contestant, workload) -> reason, on a CPU; the workload "" stands for all."""


def reason(contestant: str, workload: str, device: str) -> str:
    """Look up the reason for a row, or say that there is none yet."""
    found = REASONS.get((contestant, workload)) or REASONS.get((contestant, "")) if device == "cpu" else None
    return found or f"{contestant}, {workload}: not explained yet; profile it."
