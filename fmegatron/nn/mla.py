"""Multi-head latent attention: keys and values of all heads come from one narrow latent a token, and one rotated key.

    queries          up(norm(down x)), or up x     [batch seq heads hd]         hd = plain features, then rope_hd that turn
    latent, key      norm, turn of down x          [batch seq kv_lora], [batch seq rope_hd]
    keys, values     up latent                     [batch seq heads ...]        a head's keys are its own, then the shared one

The latents lie as the stream does, whole on every rank of tp; heads are cut. So each rank's cotangent of the latent and of
the shared key is of its own heads, and the way back to the stream adds them up.

Generating keeps latent and key only. For one new token the products with `up` change sides, (up_k c) . q = c . (up_k' q):
all heads then attend to the latents themselves, as one key/value head of kv_lora + rope_hd features.

Source: DeepSeek-V2 (arXiv 2405.04434).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmegatron.nn import context, norm, rope
from fmegatron.nn.context import QUERIES
from fmegatron.nn.norm import Norm
from fmegatron.nn.param import Init, Param

if TYPE_CHECKING:
    from fmegatron.nn.attention import Attention
    from fmegatron.sharding import Sharding


@dataclass(frozen=True)
class Latent:
    """Sizes of the latents and of a head's features; q_lora None: queries come from the stream itself."""

    kv_lora: int
    q_lora: int | None
    rope_hd: int
    v_hd: int
    norm: Norm

    def sizes(self, hd: int) -> dict[str, int]:
        """The named sizes that it adds to a table; hd: features of a query and a key."""
        inner = {"kv_lora": self.kv_lora, "kv_down": self.kv_lora + self.rope_hd, "kv_up": hd - self.rope_hd + self.v_hd}
        return inner | {"v_hd": self.v_hd} | ({} if self.q_lora is None else {"q_lora": self.q_lora})


def declare(latent: Latent, inner: Init, outer: Init) -> dict[str, Any]:
    """Its weights. kv_down makes the latent, then the shared key; kv_up of a head its keys, then its values."""
    if latent.q_lora is None:
        p: dict[str, Any] = {"q_up": Param("embed heads hd", inner)}
    else:
        p = {"q_down": Param("embed q_lora", inner), "q_norm": norm.declare(latent.norm, "q_lora")}
        p |= {"q_up": Param("q_lora heads hd", inner)}
    p |= {"kv_down": Param("embed kv_down", inner), "kv_norm": norm.declare(latent.norm, "kv_lora")}
    return p | {"kv_up": Param("kv_lora heads kv_up", inner), "o": Param("heads v_hd embed", outer)}


def apply(
    sh: Sharding, attn: Attention, latent: Latent, p: dict[str, Any], x: Tensor, v: dict[str, Any], key: Tensor | None
) -> Tensor:
    """[batch, seq, embed] -> [batch, seq, embed]; v, key: as of plain attention. `mla_up` is a part that remat may drop."""
    source, name = x, "embed"
    if latent.q_lora is not None:
        source, name = sh.einsum("batch seq embed, embed q_lora -> batch seq q_lora", x, p["q_down"]), "q_lora"
        source = norm.apply(sh, latent.norm, p["q_norm"], source)
    down = sh.einsum("batch seq embed, embed kv_down -> batch seq kv_down", x, p["kv_down"])
    c, shared = down.split((latent.kv_lora, latent.rope_hd), -1)
    c = norm.apply(sh, latent.norm, p["kv_norm"], c)
    given = {"rank": sh.rank, "key": key, "source": source, "c": c, "shared": shared, "q_up": p["q_up"], "kv_up": p["kv_up"]}
    given |= {name: value for name, value in v.items() if isinstance(value, Tensor) and name != "h"}
    given = {name: value for name, value in given.items() if value is not None}

    dropped = sh.recompute is not None and sh.recompute("mla_up") is not None
    quiet = sh.tapping(None) if dropped else sh  # what is computed again under a transform may leave no taps

    def inside(*tensors: Tensor) -> Tensor:
        g = dict(zip(given, tensors, strict=True))
        return from_latents(quiet.at(g["rank"]) if "rank" in g else quiet, attn, latent, name, g, v.get("cache"))

    y = sh.remat("mla_up", inside, *given.values())
    return sh.einsum("batch seq heads v_hd, heads v_hd embed -> batch seq embed", y, p["o"])


def from_latents(sh: Sharding, attn: Attention, latent: Latent, name: str, g: dict[str, Tensor], cache: Any) -> Tensor:
    """Attention from the latents, [batch, seq, heads, v_hd]; name: of the features that queries are made from."""
    queries = sh.einsum(f"batch seq {name}, {name} heads hd -> batch seq heads hd", g["source"], g["q_up"])
    shared = sh.align(g["shared"], "batch seq rope_hd", within="batch seq heads rope_hd")[:, :, None]
    plain, turned = queries.split((queries.shape[-1] - latent.rope_hd, latent.rope_hd), -1)
    if attn.rope is not None:
        cos, sin = g[f"{attn.table}.cos"], g[f"{attn.table}.sin"]
        turned, shared = rope.rotate_both(attn.rope, turned, shared, cos, sin, sh.kernels)
    c = g["c"]
    if cache is not None:
        c, shared = cache(c, shared)
    if cache is not None and queries.shape[1] == 1:
        return absorbed(sh, attn, plain, turned, c, shared, g)
    up = sh.einsum("batch seq kv_lora, kv_lora heads kv_up -> batch seq heads kv_up", c, g["kv_up"])
    keys, values = up.split((plain.shape[-1], latent.v_hd), -1)
    keys = torch.cat((keys, shared.expand(*keys.shape[:-1], -1)), -1)
    queries = sh.relayout(torch.cat((plain, turned), -1), f"batch seq heads hd -> {QUERIES}")
    keys, values = context.meet(sh, keys, values, "heads")
    y = context.attend(sh, attn, queries, keys, values, g, None, g.get("key"))
    return sh.relayout(y, f"{QUERIES} -> batch seq heads hd")


def absorbed(
    sh: Sharding, attn: Attention, plain: Tensor, turned: Tensor, c: Tensor, shared: Tensor, g: dict[str, Tensor]
) -> Tensor:
    """The same from queries [batch, seq, heads, ...] and all latents so far [batch, kv_seq, ...], without keys and values."""
    to_keys, to_values = g["kv_up"].split((plain.shape[-1], g["kv_up"].shape[-1] - plain.shape[-1]), -1)
    queries = torch.cat((torch.einsum("bshn,lhn->bshl", plain, to_keys), turned), -1)
    queries = sh.relayout(queries, f"batch seq heads hd -> {QUERIES}")
    y = context.attend(sh, attn, queries, torch.cat((c[:, :, None], shared), -1), c[:, :, None], g, None, g.get("key"))
    y = sh.relayout(y, f"{QUERIES} -> batch seq heads hd")
    return torch.einsum("bshl,lhv->bshv", y, to_values)
