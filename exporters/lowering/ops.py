"""The operations whose ONNX form differs between dialects.

Each function runs eagerly as written below; under ``torch.onnx.export`` it becomes one node of the domain
"ppexport", which ``dialects.py`` replaces by the nodes of the chosen dialect. Dimension letters: models/config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...models.config import DELTA_CHUNK

DOMAIN = "ppexport"
Watcher = Callable[[str, Tensor], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside, ``watcher(what, x)`` is called with every value that ``watch`` names."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def watch(what: str, x: Tensor) -> Tensor:
    """``x`` itself, shown to the watcher if there is one: how large values get (exporters/fp16_range.py)."""
    if not torch.compiler.is_exporting() and (watcher := _watcher.get()) is not None:
        watcher(what, x)
    return x


def _node(name: str, inputs: Sequence[Tensor], like: Sequence[Tensor], **attributes: Any) -> Sequence[Tensor]:
    """Emit one node of the domain "ppexport"; output i has the dtype and shape of ``like[i]``."""
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}",
        inputs,
        attributes,
        dtypes=[x.dtype for x in like],
        shapes=[x.shape for x in like],
        version=1,
    )


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Full (not causal) attention. q, k, v [B, S, heads, Dh] -> [B, S, heads, Dh].

    ``mask`` bool [B, S] says which keys are real, at least one in each row.
    """
    if torch.compiler.is_exporting():
        return _node("Attention", (q, k, v) if mask is None else (q, k, v, mask), (q,), scale=scale)[0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    keys = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale).transpose(1, 2)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    own: Tensor,
    entries: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped-query attention over a cache of fixed capacity.

    q [B, S, heads, Dh]; k, v [B, S, kv_heads, Dh]; caches [B, kv_heads, M, Dh]; own int32 [B, S], the cache entry that
    each token is written to (consecutive in a row); entries int32 [M], 0 ... M - 1. A token sees the entries up to its
    own. Returns the output [B, S, heads, Dh] and the two updated caches.
    """
    if torch.compiler.is_exporting():
        out, new_k, new_v = _node(
            "CachedAttention", (q, k, v, k_cache, v_cache, own, entries), (q, k_cache, v_cache), scale=scale
        )
        return out, new_k, new_v
    where = own.long()[:, None, :, None].expand(-1, k.shape[2], -1, k.shape[3])
    new_k = k_cache.scatter(2, where, k.transpose(1, 2).to(k_cache.dtype))
    new_v = v_cache.scatter(2, where, v.transpose(1, 2).to(v_cache.dtype))
    mask = entries <= own[:, None, :, None]
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (new_k, new_v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, scale=scale)
    return out.transpose(1, 2), new_k, new_v


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, the two halves of a head paired. x [B, S, heads, Dh]; cos, sin [B, S, Dh / 2] -> like x."""
    if torch.compiler.is_exporting():
        return _node("Rotary", (x, cos, sin), (x,))[0]
    first, second = x.chunk(2, dim=-1)
    cos = cos[:, :, None]
    sin = sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis, computed in float32. x [..., D]; weight [D] -> like x."""
    if torch.compiler.is_exporting():
        return _node("RMSNorm", (x, weight), (x,), epsilon=eps)[0]
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU, exact ("none") or by the tanh formula ("tanh"). x [...] -> like x."""
    if torch.compiler.is_exporting():
        return _node("Gelu", (x,), (x,), approximate=approximate)[0]
    return F.gelu(x, approximate=approximate)


def quick_gelu(x: Tensor) -> Tensor:
    """GELU approximated by a sigmoid, x * sigmoid(1.702 x). x [...] -> like x."""
    if torch.compiler.is_exporting():
        return _node("QuickGelu", (x,), (x,))[0]
    return x * torch.sigmoid(1.702 * x)


def causal_convolution(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel of a token mixed with those of the tokens before it, then SiLU.

    x [B, S, C]; weight [C, 1, n], of the n - 1 tokens before and of its own; state [B, n - 1, C], the inputs of the
    tokens before the first. Returns [B, S, C] and the state behind the last.
    """
    if torch.compiler.is_exporting():
        out, new = _node("CausalConvolution", (x, weight, state), (x, state))
        return out, new
    whole = torch.cat((state.to(x.dtype), x), dim=1)
    out = F.conv1d(whole.transpose(1, 2), weight.to(x.dtype), groups=x.shape[2]).transpose(1, 2)
    return F.silu(out), whole[:, x.shape[1] :].to(state.dtype)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Linear attention by the gated delta rule, in float32.

    q, k [B, S, Hk, dk] of length 1, each head for Hv / Hk value heads in a row; v [B, S, Hv, dv]; decay (its logarithm)
    and beta [B, S, Hv]; state M [B, Hv, dk, dv]. With each token the state decays, what it knows under the key is
    replaced by v in the share beta, and the query reads it: M = e^decay M; M = M + beta k (v - M k);
    out = M q / sqrt(dk). Returns [B, S, Hv, dv] and the state behind the last token.
    """
    if torch.compiler.is_exporting():
        out, new = _node("DeltaRule", (q, k, v, decay, beta, state), (v, state))
        return out, new
    groups = v.shape[2] // q.shape[2]
    B, S, heads, width = v.shape
    q = q * q.shape[-1] ** -0.5
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    count = -(-S // DELTA_CHUNK)
    padding = count * DELTA_CHUNK - S

    def chunks(x: Tensor) -> Tensor:
        """[B, S, H, ...] -> [B, H, chunks, DELTA_CHUNK, ...]; what is filled up changes nothing: no decay, no beta."""
        filled = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))
        return filled.unflatten(1, (count, DELTA_CHUNK)).movedim(3, 1)

    q, k, v, decay, beta = (chunks(x) for x in (q, k, v, decay, beta))
    outputs = []
    for step in range(count):
        own_q, own_k, own_v, own_decay, own_beta = (x[:, :, step] for x in (q, k, v, decay, beta))
        out, state = _chunk(own_q, own_k, own_v, own_decay, own_beta, state)
        outputs.append(out)
    found = torch.stack(outputs, 2).movedim(1, 3).reshape(B, count * DELTA_CHUNK, heads, width)
    return found[:, :S], state


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens of one chunk together: q, k [B, H, n, dk], v [B, H, n, dv], decay, beta [B, H, n], state
    [B, H, dk, dv].

    What token i puts in, u_i, depends on what the tokens before it in the chunk put in: a triangular system, solved at
    once. Source: Yang et al. 2024, section 3.3.
    """
    n = q.shape[2]
    since = decay.cumsum(-1)  # from the beginning of the chunk
    lower = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    between = (since.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(~lower, float("-inf")).exp()
    keys = k * beta.unsqueeze(-1)
    system = (keys @ k.transpose(-1, -2)) * between  # its diagonal is not read
    known = keys * since.exp().unsqueeze(-1) @ state
    put_in = torch.linalg.solve_triangular(
        system, v * beta.unsqueeze(-1) - known, upper=False, unitriangular=True
    )
    out = (q * since.exp().unsqueeze(-1)) @ state + ((q @ k.transpose(-1, -2)) * between) @ put_in
    last = since[..., -1:]
    left = k * (last - since).exp().unsqueeze(-1)
    return out, state * last.exp().unsqueeze(-1) + left.transpose(-1, -2) @ put_in
