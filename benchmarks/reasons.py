"""Why a measured ratio is off the predicted one, and how much of that is known.

Each text says what it rests on. A guess is called one; profile again when the code changes.
"""

from __future__ import annotations

REASONS: dict[tuple[str, str], str] = {
    ("TRL as shipped", ""): (
        "TRL as shipped: inferred from the compacted row, not profiled. The two differ in the head alone; on long "
        "prompts that is 27 CPU s for 3,200 positions more, 8 ms each, where their products need 1 ms at peak. "
        "A guess at the rest: torch operations over float32 logits, and pages for them (a fifth of the process's CPU "
        "time was the kernel's)."
    ),
    ("TRL best tuned", "chat-like"): (
        "TRL best tuned: partly explained. One profiled DPO step, on a busy machine (24.6 CPU s, not 10): products "
        "32 %, mul, add, copy and fill 35 %, attention 11 %, dequantization 9 %, the head's forward and backward 10 %. "
        "Which code the elementwise third belongs to was not traced; PEFT's unfused LoRA is at most part of it, since "
        "qpref without its fused LoRA is barely slower. KTO was not profiled."
    ),
}
"""(contestant, workload) -> why; a workload of "" is for all."""


def reason(contestant: str, workload: str) -> str:
    found = REASONS.get((contestant, workload)) or REASONS.get((contestant, ""))
    return found or f"{contestant}, {workload}: not explained yet; profile it."
