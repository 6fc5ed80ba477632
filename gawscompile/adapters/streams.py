"""Where architectures meet their residual streams, and the configuration of the adapter that widens them (`zflora`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key

from gawscompile.adapters.config import CheckedConfig
from gawscompile.adapters.support import AdapterType

DIRECTIONS = ("both", "forward", "backward")


@dataclass(frozen=True)
class Stream:
    """Where an architecture's modules meet the residual stream: ends of their paths."""

    first: tuple[str, ...]
    norms: tuple[str, ...]
    last: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    refused: tuple[str, ...] = ()

    def role(self, path: str) -> str | None:
        """"first", "norm", "last", "reader", "writer" or None."""
        for role, ends in (
            ("first", self.first),
            ("norm", self.norms),
            ("last", (self.last,)),
            ("reader", self.readers),
            ("writer", self.writers),
        ):
            if ends_with(path, ends):
                return role
        return None


def ends_with(path: str, ends: Iterable[str]) -> bool:
    return any(path == end or path.endswith(f".{end}") for end in ends)


_LLAMA = Stream(
    first=("layers.0",),
    norms=("input_layernorm", "post_attention_layernorm"),
    last="norm",
    readers=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    writers=("o_proj", "down_proj"),
)
STREAMS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": Stream(
        first=("h.0",),
        norms=("ln_1", "ln_2"),
        last="ln_f",
        readers=("attn.c_attn", "mlp.c_fc"),
        writers=("attn.c_proj", "mlp.c_proj"),
        refused=("crossattention",),
    ),
    "t5": Stream(
        first=("block.0",),
        norms=("layer_norm",),
        last="final_layer_norm",
        readers=(
            *("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "EncDecAttention.q"),
            *("DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1"),
        ),
        writers=("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),
    ),
}
"""By ``config.model_type``. T5's cross-attention reads the encoder's output, from which z is dropped, with k and v."""


@dataclass
class ZFLoRAConfig(CheckedConfig):
    """The widened stream of Llama-type models, GPT-2 and T5.

    r: width of z.
    rank_pattern: smaller ranks for single modules, by the end of their paths: such a module writes or reads the first
        few numbers of z alone.
    target_modules, exclude_modules: which readers and writers have factors, as in PEFT's LoRA; None stands for all.
    direction: ``"both"``, or ``"forward"`` or ``"backward"`` alone.
    init_weights: start as the base (what reads z is zero). False: everything random.
    model_type: of the model the adapter was made for; set by the tuner.

    Raises `ValueError` on what cannot be meant; on loading also for keys that are not known.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    direction: str = "both"
    init_weights: bool = True
    model_type: str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = AdapterType.ZFLORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction={self.direction!r}: it is one of {', '.join(map(repr, DIRECTIONS))}")
        self.rank_pattern = self.rank_pattern or {}
        ranks: dict[str, Any] = {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for name, value in {"r": self.r, **ranks}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: it is a whole number from 1 up")
            if value > self.r:
                raise ValueError(f"{name}={value}: z is only r={self.r} wide")

    def rank_of(self, path: str) -> int:
        """How much of z the module at `path` writes or reads."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), path), self.r)

    def stream(self) -> Stream:
        """Raises `ValueError` for an architecture that is not known."""
        if self.model_type not in STREAMS:
            raise ValueError(
                f"zFLoRA knows the residual streams of {', '.join(sorted(STREAMS))}, not of {self.model_type!r}"
            )
        return STREAMS[self.model_type]

    def has_factors(self, path: str) -> bool:
        """Whether the module at `path`, a reader or writer, has factors of its own."""
        role = self.stream().role(path)
        if role not in ("reader", "writer") or self.direction == ("forward" if role == "reader" else "backward"):
            return False
        return self.target_modules is None or bool(BaseTuner._check_target_module_exists(self, path))
