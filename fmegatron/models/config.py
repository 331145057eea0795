"""The config of a decoder, and what it means for each layer. Every field is a key in TOML and on the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fmegatron.nn.attention import Attention
from fmegatron.nn.losses import Loss
from fmegatron.nn.mla import Latent
from fmegatron.nn.mlp import Mlp
from fmegatron.nn.moe import Moe
from fmegatron.nn.norm import Norm
from fmegatron.nn.rope import Rope, Scaling, Yarn
from fmegatron.sharding import Size


@dataclass(frozen=True)
class Config:
    """A decoder."""

    # sizes
    layers: int
    embed: int
    heads: int
    mlp: int
    vocab: int
    kv: int | None = None  # key/value heads; None: as many as heads
    hd: int | None = None  # features of a head; None: embed / heads
    context: int = 2048  # longest sequence: the rows of learned positions
    vocab_pad: int = 1  # the vocabulary is padded to a multiple of it
    # positions
    positions: Literal["rope", "learned", "none"] = "rope"
    rope_base: float = 10000.0
    rope_window_base: float | None = None  # another base for windowed layers (Gemma 3)
    rope_fraction: float = 1.0
    rope_interleaved: bool = False
    rope_interpolation: float = 1.0
    rope_scaling: Scaling | None = None
    no_rope: int | tuple[bool, ...] = 0  # n: every n-th layer turns nothing; or a flag for each layer
    # attention
    window: int | None = None  # keys that a query sees, itself included
    no_window: int | tuple[bool, ...] = 0  # n: every n-th layer sees everything; or a flag for each layer
    attention_scale: float | None = None  # None: 1 / sqrt(hd)
    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: Literal["none", "norm", "l2"] = "none"
    qk_layer_scaling: bool = False  # queries / layer number, undone after the product: keeps fp16 scores small
    depth_scaling: bool = False  # scores / layer number, not undone (GPT-2's scale_attn_by_inverse_layer_idx)
    attention_softcap: float | None = None
    qk_clip: float | None = None  # after a step that saw a larger score, that head's queries and keys are scaled back to it
    qk_clip_alpha: float = 0.5  # the queries' part of it
    sink: Literal["none", "one", "learned"] = "none"
    # latent attention, where kv_lora is set
    kv_lora: int | None = None  # features of the latent of keys and values
    q_lora: int | None = None  # of the latent of queries; None: queries come from the stream
    rope_hd: int = 64  # of a head's hd, those that turn; their key is shared by the heads
    v_hd: int | None = None  # features of a value; None: hd - rope_hd
    # mlp
    activation: str = "swiglu"
    mlp_bias: bool = False
    glu_limit: float | None = None  # of gated kinds: the gate is at most it, the other projection within +- it
    glu_offset: float = 0.0  # and is added to that other projection
    moe: Moe | None = None  # experts in place of the mlp, in the layers that it says
    # norms
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_centred: bool = False
    norm_bias: bool = True  # of LayerNorm
    norm_at: Literal["pre", "post", "peri", "out"] = "pre"
    embed_norm: bool = False
    # ends
    tied: bool = False
    embed_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    fp32_residual: bool = False  # the residual stream in fp32, whatever the blocks compute in
    residual_multiplier: float = 1.0  # of what each block adds to the residual stream
    logit_softcap: float | None = None
    # loss
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    loss_chunks: int = 1
    mtp: int = 0  # so many further tokens are predicted too, each by a layer of its own
    mtp_weight: float = 0.1  # of their losses' mean
    # dropout
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    # initial values
    init_std: float = 0.02
    init_scaled: bool = True  # output projections / sqrt(2 layers), as Megatron-LM and GPT-2 do

    def __post_init__(self) -> None:
        kv = self.heads if self.kv is None else self.kv
        if self.heads % kv:
            legal = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(f"heads = {self.heads} do not divide into kv = {kv} groups: kv can be one of {legal}")
        if self.hd is None and self.embed % self.heads:
            raise ValueError(f"embed = {self.embed} does not divide into heads = {self.heads}: change one, or set hd")
        for name, flags in (("no_rope", self.no_rope), ("no_window", self.no_window)):
            if isinstance(flags, tuple | list) and len(flags) != self.layers:
                raise ValueError(f"{name} has {len(flags)} flags for layers = {self.layers}")
        if self.moe is not None and not isinstance(self.moe.layers, int) and len(self.moe.layers) != self.layers:
            raise ValueError(f"moe.layers has {len(self.moe.layers)} flags for layers = {self.layers}")
        if self.moe is not None and self.moe.first_dense >= self.layers:
            most = self.layers - 1
            raise ValueError(f"moe.first_dense = {self.moe.first_dense} of layers = {self.layers}: it is 0 to {most}")
        if self.mtp < 0:
            raise ValueError(f"mtp = {self.mtp}: so many modules look ahead, 0 or more")
        if self.qk_clip is not None and (self.qk_norm != "none" or self.attention_softcap or self.kv_lora or self.qk_clip <= 0):
            raise ValueError(f"qk_clip = {self.qk_clip}: above 0, and without qk_norm, attention_softcap and latent attention")
        if self.fp32_residual and self.norm_at == "post":
            raise ValueError("fp32_residual with norm_at = post: the stream is a norm's output there, in the blocks' dtype")
        if self.qk_layer_scaling and self.attention_softcap is not None:
            raise ValueError("qk_layer_scaling and attention_softcap are both set: use one")
        if self.kv_lora is not None:
            self._check_latent()
        for name, words in idle(vars(self)).items():
            raise ValueError(f"{name} = {getattr(self, name)} does nothing without {words}")
        if self.mtp and self.positions == "learned":
            raise ValueError(f"mtp = {self.mtp} with learned positions: a layer that looks ahead has none, use rope")

    def _check_latent(self) -> None:
        """ValueError where an option of plain attention is asked of a latent one."""
        if not 0 < self.rope_hd < self.head_dim:
            raise ValueError(f"rope_hd = {self.rope_hd} features of hd = {self.head_dim} turn: some, not all, with a latent")
        if self.rope_hd % 2:
            raise ValueError(f"rope_hd = {self.rope_hd}: features turn in pairs, use {self.rope_hd - 1} or {self.rope_hd + 1}")
        plain = {"kv": None, "attention_bias": False, "attention_out_bias": False, "qk_norm": "none", "rope_fraction": 1.0}
        plain |= {"sink": "none", "positions": "rope"}
        for name, value in plain.items():
            if getattr(self, name) not in (value, self.heads if name == "kv" else value):
                raise ValueError(f"{name} = {getattr(self, name)!r} is of plain attention: leave it out with kv_lora")

    @property
    def sizes(self) -> dict[str, int | Size]:
        """The table of named sizes."""
        heads, vocab = self.heads, Size(self.vocab, self.vocab_pad) if self.vocab_pad > 1 else self.vocab
        return {
            "embed": self.embed,
            "heads": heads,
            "kv": heads if self.kv is None else self.kv,
            "hd": self.head_dim,
            "mlp": self.mlp,
            "vocab": vocab,
            "position": self.context,
            **({"joined": 2 * self.embed} if self.mtp else {}),
            **({} if self.latent is None else self.latent.sizes(self.head_dim)),
            **(self.moe.sizes(self.mlp) if self.moe is not None else {}),
        }

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.embed // self.heads if self.hd is None else self.hd

    @property
    def latent(self) -> Latent | None:
        """The latents of attention."""
        if self.kv_lora is None:
            return None
        values = self.v_hd or self.head_dim - self.rope_hd
        return Latent(self.kv_lora, self.q_lora, self.rope_hd, values, self.block_norm)

    @property
    def turned(self) -> int:
        """Features of a head that come to the rotation."""
        return self.head_dim if self.kv_lora is None else self.rope_hd

    @property
    def scale(self) -> float:
        """Of the scores: as set, else 1 / sqrt(hd), with a latent times YaRN's growth by mscale_all, squared."""
        if self.attention_scale is not None:
            return self.attention_scale
        s = self.rope_scaling
        grown = s.m(s.mscale_all) if isinstance(s, Yarn) and s.mscale_all and self.kv_lora is not None else 1.0
        return grown**2 / math.sqrt(self.head_dim)

    @property
    def block_norm(self) -> Norm:
        """The norm of the residual stream."""
        return Norm(self.norm, self.norm_eps, self.norm_centred, self.norm_bias)

    @property
    def block_mlp(self) -> Mlp:
        """The feed-forward block."""
        return Mlp(self.activation, self.mlp_bias, self.glu_limit, self.glu_offset)

    @property
    def head(self) -> Loss:
        """How logits are made and judged."""
        return Loss(self.label_smoothing, self.z_loss, self.logit_softcap, self.logit_multiplier)

    @property
    def dropouts(self) -> bool:
        """Whether training differs from evaluation, by dropout or a router's noise."""
        rates = max(self.embed_dropout, self.attention_dropout, self.hidden_dropout)
        return rates > 0 or (self.moe is not None and self.moe.trains_otherwise)


def idle(values: Mapping[str, Any]) -> dict[str, str]:
    """{option: what it does nothing without} of a decoder's options that are set in vain; one not given has its default."""

    def given(name: str) -> Any:
        return values.get(name, getattr(Config, name, None))

    rope, window = given("positions") == "rope", given("window") is not None
    met = {
        "rope_base rope_fraction rope_interleaved rope_interpolation rope_scaling": (rope, "positions = rope"),
        "no_rope": (rope or not any(chosen(given("no_rope"), i) for i in range(given("layers"))), "positions = rope"),
        "rope_window_base": (rope and window, "positions = rope and a window"),
        "no_window": (window or not isinstance(given("no_window"), int), "a window"),
        "norm_bias": (given("norm") == "layer", "norm = layer"),
        "q_lora rope_hd v_hd": (given("kv_lora") is not None, "latent attention: kv_lora"),
        "qk_clip_alpha": (given("qk_clip") is not None, "qk_clip"),
        "mtp_weight": (given("mtp"), "mtp, modules that look ahead"),
    }
    unmet = {name: words for names, (has, words) in met.items() if not has for name in names.split()}
    return {name: words for name, words in unmet.items() if given(name) != getattr(Config, name)}


def chosen(flags: int | tuple[bool, ...], layer: int) -> bool:
    """Whether a layer (from 0) is one of every n-th (n, 2n, … counted from 1, as Megatron-LM counts), or flagged."""
    return (flags > 0 and (layer + 1) % flags == 0) if isinstance(flags, int) else flags[layer]


def attention_of(c: Config, layer: int) -> Attention:
    """What a layer's attention computes; layers with equal values are of one kind, and compile once."""
    window = None if c.window is None or chosen(c.no_window, layer) else c.window
    local = c.rope_window_base is not None and window is not None
    base = c.rope_window_base if local and c.rope_window_base is not None else c.rope_base
    turns = Rope(
        base,
        c.rope_fraction,
        c.rope_interleaved,
        1.0 if local else c.rope_interpolation,
        None if local else c.rope_scaling,
    )
    return Attention(
        scale=c.scale / (layer + 1) if c.depth_scaling else c.scale,
        rope=turns if c.positions == "rope" and not chosen(c.no_rope, layer) else None,
        table="rope.window" if local else "rope",
        window=window,
        bias=c.attention_bias,
        out_bias=c.attention_out_bias,
        norm={"none": None, "norm": c.block_norm, "l2": Norm("l2", c.norm_eps)}[c.qk_norm],
        softcap=c.attention_softcap,
        sink=None if c.sink == "none" else c.sink,
        undo=float(layer + 1) if c.qk_layer_scaling else 1.0,
        dropout=c.attention_dropout,
        clip=c.qk_clip is not None,
        latent=c.latent,
    )


def moe_of(c: Config, layer: int) -> Moe | None:
    """A layer's experts, None where it is dense."""
    return c.moe if c.moe is not None and c.moe.at(layer) else None


def kinds(c: Config) -> list[Attention]:
    """The kind of each layer."""
    return [attention_of(c, i) for i in range(c.layers)]
