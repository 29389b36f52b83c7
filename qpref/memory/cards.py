"""NVIDIA cards by name: memory that torch can have on each, and what their compute capability rules out.

A card's box says less than its driver: error correction takes a sixteenth of a T4, and 1.5 GiB of an A10G or L4. The
driver then keeps a part that nvidia-smi counts and no program gets, and torch's CUDA context takes another. Numbers
without a source are assumed, and are named so wherever they are printed. Needs no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qpref.errors import RecipeError
from qpref.memory.parts import CONTEXT_BYTES, GIB

MIB = 2**20
DRIVER_BYTES, DRIVER_SHARE = 500 * MIB, 0.0025
"""Assumed share of the driver, on top of nvidia-smi's total. It is at least the difference between that and the total
capacity in torch's out-of-memory messages on Linux, with drivers of up to 2026:
RTX 4090 24564 MiB and 23.52 GiB (Soul-AILab/SoulX-FlashTalk#5), RTX 3060 12288 MiB and 11.75 GiB
(Kunhao-Liu/StyleGaussian#12), T4 15360 MiB and 14.56 GiB (Zheng-Chong/CatVTON#133), A10G 23028 MiB and 22.19 GiB
(meta-pytorch/torchtune#229), RTX 6000 Ada 46068 MiB and 44.43 GiB (DINGYANB/MTVCrafter#21), L40 46068 MiB and 44.40 GiB
(QwenLM/Qwen3-VL#2097), RTX 5090 32607 MiB and 31.37 GiB (Wan-Video/Wan2.1#465). A100s keep more, by their own rows."""
DESKTOP_BYTES = GIB
"""Assumed share of a desktop, its browser included, on a card that drives a display: 0.3 to 1.5 GiB."""

BF16_CAPABILITY = (8, 0)
KERNEL_CAPABILITY = (7, 5)
"""Least compute capability that torch 2.11 and later has kernels for, but for its CUDA 12.6 wheels
(github.com/pytorch/pytorch, issue 172352)."""

ASSUMED = "assumed"
SMI = "nvidia-smi, as printed in public repositories"
MODAL = "nvidia-smi, github.com/modal-labs/modal-client/pull/2797"
CAPABILITIES = "developer.nvidia.com/cuda-gpus"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A card.

    Attributes:
        name: as on the box, without the memory.
        box_gib: memory on the box; sellers say GB and mean GiB.
        total_bytes: what nvidia-smi calls total, with error correction as the card comes.
        total_source: source of that.
        capability: compute capability (see CAPABILITIES).
        driver_bytes: of the total, the part that no program gets.
        driver_source: source of that.
    """

    name: str
    box_gib: int
    total_bytes: int
    total_source: str
    capability: tuple[int, int]
    driver_bytes: int
    driver_source: str = ASSUMED

    @property
    def title(self) -> str:
        return f"{self.name} {self.box_gib}GB"

    @property
    def ecc_bytes(self) -> int:
        """Memory that error correction takes: 0 where it is off as the card comes, or has memory of its own."""
        missing = self.box_gib * GIB - self.total_bytes
        return missing if missing >= self.box_gib * GIB // 32 else 0

    def usable_bytes(self, desktop: bool = False) -> int:
        """Memory that torch can allocate once its CUDA context exists, beside a desktop or alone."""
        return self.total_bytes - self.driver_bytes - CONTEXT_BYTES - (DESKTOP_BYTES if desktop else 0)

    def limit_origin(self, desktop: bool = False) -> str:
        """Write where `usable_bytes` comes from, for the plan."""
        parts = [f"{self.driver_bytes / GIB:.2f} of the driver", f"{CONTEXT_BYTES / GIB:.2f} of the CUDA context"]
        if desktop:
            parts.append(f"{DESKTOP_BYTES / GIB:.2f} of a desktop")
        listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
        guess = " (assumed)" if self.total_source == ASSUMED else ""
        return f"{self.title} of {self.total_bytes / GIB:.2f} GiB{guess}, less {listed} (assumed)"

    def facts(self, desktop: bool = False) -> dict[str, Any]:
        """Write the card as JSON data, each number with its source."""
        facts: dict[str, Any] = {
            "name": self.title,
            "capability": {"value": ".".join(map(str, self.capability)), "source": CAPABILITIES},
            "total": {"bytes": self.total_bytes, "source": self.total_source},
            "ecc": {"bytes": self.ecc_bytes, "source": "box less total"},
            "driver": {"bytes": self.driver_bytes, "source": self.driver_source},
            "context": {"bytes": CONTEXT_BYTES, "source": "github.com/pytorch/pytorch/issues/107667"},
        }
        if desktop:
            facts["desktop"] = {"bytes": DESKTOP_BYTES, "source": ASSUMED}
        return facts | {"usable": {"bytes": self.usable_bytes(desktop), "source": "total less the rest"}}


def capability_notes(name: str, capability: tuple[int, int], dtype: str) -> Iterator[str]:
    """Sentences on what a GPU of this compute capability can't run, each with the way out."""
    has = f"{name} has compute capability {'.'.join(map(str, capability))}"
    if capability < KERNEL_CAPABILITY:
        yield f"{has}: torch 2.11 and later has kernels for it in its CUDA 12.6 wheels alone; install one of those"
    if dtype == "bf16" and capability < BF16_CAPABILITY:
        yield f'{has}, so no bf16: training refuses [model] dtype = "bf16"; set it to "fp16" (planned alike)'


def find_card(text: str) -> Card:
    """Find the card that a text names, in any spelling: `rtx3060 12 gb`, `NVIDIA GeForce RTX 3060 (12GB)`, `3060 12G`.

    Raises:
        RecipeError: no card or several have that name; the message lists the candidates.
    """
    words, gib = _words(text)
    named = [card for card in CARDS if _words(card.name)[0] == words]
    named = named or [card for card in CARDS if words and words <= _words(card.name)[0]]
    fitting = [card for card in named if gib in (None, card.box_gib)]
    if len(fitting) == 1:
        return fitting[0]
    titles = ", ".join(card.title for card in fitting or named)
    if named:
        problem = "more than one card has this name" if fitting else f"this card has no {gib} GB"
        raise RecipeError(f"--card {text}: {problem}", f"write one of these, or --vram SIZE: {titles}")
    known = {" ".join(sorted(_words(card.name)[0])): card.name for card in CARDS}
    close = [known[name] for name in difflib.get_close_matches(" ".join(sorted(words)), known, n=4)]
    near = f"; the closest names are {', '.join(close)}" if close else ""
    raise RecipeError(f"--card {text}: no card of this name is known{near}", "plan by its free memory: --vram 12GiB")


def _words(text: str) -> tuple[frozenset[str], int | None]:
    """Split a card's name into the words that tell cards apart, and the memory in GB where it is named."""
    text = text.lower()
    memory = re.search(r"\b(\d+)[\s-]*g(?:i?b)?\b", text)
    text = text if memory is None else text[: memory.start()] + " " + text[memory.end() :]
    text = text.replace("mobile", "laptop")
    text = re.sub(r"(?<=\d)(?=ti|super|laptop)|(?<=ti)(?=super)|(?<=[gr]tx)(?=[a\d])", " ", text)
    words = set(re.findall(r"[a-z0-9]+", text))
    return frozenset(words) - UNTELLING, None if memory is None else int(memory[1])


UNTELLING = frozenset(
    ("nvidia", "geforce", "tesla", "rtx", "gtx", "gpu", "graphics", "card", "generation", "edition", "blackwell",
     "workstation", "server", "pcie", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "hbm2", "hbm2e", "hbm3", "hbm3e", "max",
     "q")
)  # fmt: skip
"""Words of cards' names that tell no two cards of the table apart."""

ROWS: tuple[tuple[str, int, int, str, str], ...] = (
    # name, GiB on the box, MiB by nvidia-smi, compute capability, source of the MiB
    ("GTX 1070", 8, 8192, "6.1", ASSUMED),
    ("GTX 1080", 8, 8192, "6.1", ASSUMED),
    ("GTX 1080 Ti", 11, 11264, "6.1", "nvidia-smi, github.com/PromtEngineer/localGPT/issues/14"),
    ("GTX 1660 SUPER", 6, 6144, "7.5", ASSUMED),
    ("GTX 1660 Ti", 6, 6144, "7.5", ASSUMED),
    ("RTX 2060", 6, 6144, "7.5", ASSUMED),
    ("RTX 2060", 12, 12288, "7.5", ASSUMED),
    ("RTX 2060 SUPER", 8, 8192, "7.5", ASSUMED),
    ("RTX 2070", 8, 8192, "7.5", ASSUMED),
    ("RTX 2070 SUPER", 8, 8192, "7.5", ASSUMED),
    ("RTX 2080", 8, 8192, "7.5", ASSUMED),
    ("RTX 2080 SUPER", 8, 8192, "7.5", ASSUMED),
    ("RTX 2080 Ti", 11, 11264, "7.5", SMI),
    ("TITAN RTX", 24, 24576, "7.5", ASSUMED),
    ("RTX 3050", 6, 6144, "8.6", ASSUMED),
    ("RTX 3050", 8, 8192, "8.6", ASSUMED),
    ("RTX 3060", 8, 8192, "8.6", ASSUMED),
    ("RTX 3060", 12, 12288, "8.6", "nvidia-smi, github.com/geerlingguy/raspberry-pi-pcie-devices/issues/790"),
    ("RTX 3060 Laptop", 6, 6144, "8.6", ASSUMED),
    ("RTX 3060 Ti", 8, 8192, "8.6", SMI),
    ("RTX 3070", 8, 8192, "8.6", "nvidia-smi, github.com/ace-step/ACE-Step/issues/344"),
    ("RTX 3070 Laptop", 8, 8192, "8.6", ASSUMED),
    ("RTX 3070 Ti", 8, 8192, "8.6", ASSUMED),
    ("RTX 3080", 10, 10240, "8.6", ASSUMED),
    ("RTX 3080", 12, 12288, "8.6", ASSUMED),
    ("RTX 3080 Laptop", 8, 8192, "8.6", ASSUMED),
    ("RTX 3080 Laptop", 16, 16384, "8.6", ASSUMED),
    ("RTX 3080 Ti", 12, 12288, "8.6", SMI),
    ("RTX 3080 Ti Laptop", 16, 16384, "8.6", ASSUMED),
    ("RTX 3090", 24, 24576, "8.6", ASSUMED),
    ("RTX 3090 Ti", 24, 24564, "8.6", SMI),
    ("RTX 4050 Laptop", 6, 6141, "8.9", ASSUMED),
    ("RTX 4060", 8, 8188, "8.9", SMI),
    ("RTX 4060 Laptop", 8, 8188, "8.9", SMI),
    ("RTX 4060 Ti", 8, 8188, "8.9", SMI),
    ("RTX 4060 Ti", 16, 16380, "8.9", SMI),
    ("RTX 4070", 12, 12282, "8.9", SMI),
    ("RTX 4070 Laptop", 8, 8188, "8.9", ASSUMED),
    ("RTX 4070 SUPER", 12, 12282, "8.9", SMI),
    ("RTX 4070 Ti", 12, 12282, "8.9", ASSUMED),
    ("RTX 4070 Ti SUPER", 16, 16376, "8.9", ASSUMED),
    ("RTX 4080", 16, 16376, "8.9", SMI),
    ("RTX 4080 Laptop", 12, 12282, "8.9", ASSUMED),
    ("RTX 4080 SUPER", 16, 16376, "8.9", ASSUMED),
    ("RTX 4090", 24, 24564, "8.9", "nvidia-smi, github.com/RLinf/RLinf/issues/255"),
    ("RTX 4090 Laptop", 16, 16376, "8.9", ASSUMED),
    ("RTX 5050", 8, 8151, "12.0", ASSUMED),
    ("RTX 5060", 8, 8151, "12.0", ASSUMED),
    ("RTX 5060 Laptop", 8, 8151, "12.0", ASSUMED),
    ("RTX 5060 Ti", 8, 8151, "12.0", ASSUMED),
    ("RTX 5060 Ti", 16, 16311, "12.0", SMI),
    ("RTX 5070", 12, 12227, "12.0", "nvidia-smi, github.com/shkhln/libc6-shim/issues/14"),
    ("RTX 5070 Laptop", 8, 8151, "12.0", ASSUMED),
    ("RTX 5070 Ti", 16, 16303, "12.0", SMI),
    ("RTX 5070 Ti Laptop", 12, 12227, "12.0", ASSUMED),
    ("RTX 5080", 16, 16303, "12.0", SMI),
    ("RTX 5080 Laptop", 16, 16303, "12.0", ASSUMED),
    ("RTX 5090", 32, 32607, "12.0", SMI),
    ("RTX 5090 Laptop", 24, 24463, "12.0", ASSUMED),
    ("Quadro RTX 6000", 24, 24576, "7.5", ASSUMED),
    ("Quadro RTX 8000", 48, 49152, "7.5", ASSUMED),
    ("RTX A2000", 6, 6138, "8.6", ASSUMED),
    ("RTX A2000", 12, 12282, "8.6", ASSUMED),
    ("RTX A4000", 16, 16376, "8.6", SMI),
    ("RTX A4500", 20, 20470, "8.6", ASSUMED),
    ("RTX A5000", 24, 24564, "8.6", ASSUMED),
    ("RTX A6000", 48, 49140, "8.6", SMI),
    ("RTX 2000 Ada", 16, 16380, "8.9", SMI),
    ("RTX 4000 Ada", 20, 20475, "8.9", ASSUMED),
    ("RTX 5000 Ada", 32, 32760, "8.9", ASSUMED),
    ("RTX 6000 Ada", 48, 46068, "8.9", "nvidia-smi, github.com/DINGYANB/MTVCrafter/issues/21"),
    ("RTX PRO 6000", 96, 97887, "12.0", ASSUMED),
    ("P40", 24, 23040, "6.1", ASSUMED),
    ("P100", 16, 16384, "6.0", SMI),
    ("V100", 16, 16384, "7.0", SMI),
    ("V100", 32, 32768, "7.0", ASSUMED),
    ("T4", 16, 15360, "7.5", MODAL),
    ("A10", 24, 23028, "8.6", MODAL),
    ("A10G", 24, 23028, "8.6", "nvidia-smi of the A10, github.com/modal-labs/modal-client/pull/2797"),
    ("A30", 24, 24576, "8.0", ASSUMED),
    ("A40", 48, 46068, "8.6", SMI),
    ("L4", 24, 23034, "8.9", MODAL),
    ("L40", 48, 46068, "8.9", ASSUMED),
    ("L40S", 48, 46068, "8.9", MODAL),
    ("A100", 40, 40960, "8.0", MODAL),
    ("A100", 80, 81920, "8.0", MODAL),
    ("H100", 80, 81559, "9.0", MODAL),
    ("H100 NVL", 94, 95830, "9.0", ASSUMED),
    ("H200", 141, 143771, "9.0", SMI),
    ("H200 NVL", 141, 143771, "9.0", ASSUMED),
)

DRIVERS = {
    ("A100", 40): (40960 - 40339, "deviceQuery, github.com/bottlerocket-os/bottlerocket/pull/3873"),
    ("A100", 80): (81920 - 81039, "79.14 GiB in torch, github.com/lianqi1008/Control-GIC/issues/6"),
}
"""Cards whose driver keeps more than the rule of DRIVER_BYTES: MiB, and the source."""


def _card(name: str, box_gib: int, total_mib: int, capability: str, source: str) -> Card:
    rule = (DRIVER_BYTES + int(DRIVER_SHARE * total_mib * MIB)) // MIB, ASSUMED
    driver_mib, driver_source = DRIVERS.get((name, box_gib), rule)
    major, _, minor = capability.partition(".")
    return Card(
        name=name,
        box_gib=box_gib,
        total_bytes=total_mib * MIB,
        total_source=source,
        capability=(int(major), int(minor)),
        driver_bytes=driver_mib * MIB,
        driver_source=driver_source,
    )


CARDS = tuple(_card(*row) for row in ROWS)
