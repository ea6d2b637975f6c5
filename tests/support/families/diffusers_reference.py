"""What a Diffusers model gives with the float64 oracle in the place of its attention: nothing of the patch runs."""

import contextlib
import copy
import inspect
import sys

import torch
from torch.utils._pytree import tree_leaves

from support.families.oracle_function import oracle_attention


def outputs(model, inputs):
    """All tensors that come out of a model, flattened into one."""
    plain = {"return_dict": False} if "return_dict" in inspect.signature(model.forward).parameters else {}
    return torch.cat([x.flatten() for x in tree_leaves(model(**inputs, **plain)) if isinstance(x, torch.Tensor)])


def reference(stock, names, inputs):
    """The outputs of the stock model with the oracle in the modules of these names."""
    stock = copy.deepcopy(stock)
    with oracle_in(stock, names) as reached:
        found = outputs(stock, inputs)
    assert reached == set(names), f"no call of {set(names) - reached}"
    return found


@contextlib.contextmanager
def oracle_in(stock, names):
    """Inside, diffusers' dispatcher is the oracle for modules of these names. Gives the names of those that called it."""
    running, reached = [], set()
    hooks = []
    for name in names:
        module = stock.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))

    def instead_of(dispatch):
        def dispatch_attention_fn(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, *args, **kwargs):
            if not running:
                return dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, *args, **kwargs)
            reached.add(running[-1])
            heads_first = [x.transpose(1, 2) for x in (query, key, value)]
            return attention(*heads_first, attn_mask, is_causal, scale).to(query).transpose(1, 2)

        return dispatch_attention_fn

    places = [
        vars(module)
        for name, module in list(sys.modules.items())
        if name.startswith("diffusers.models") and "dispatch_attention_fn" in vars(module)
    ]
    saved = [(place, place["dispatch_attention_fn"]) for place in places]
    try:
        for place, dispatch in saved:
            place["dispatch_attention_fn"] = instead_of(dispatch)
        yield reached
    finally:
        for place, dispatch in saved:
            place["dispatch_attention_fn"] = dispatch
        for hook in hooks:
            hook.remove()


def attention(query, key, value, mask, causal, scale):
    """The oracle for a mask as the dispatcher gets it: query [B, H, Lq, D], key and value [B, Hk, Lk, D]."""
    if mask is None:
        return oracle_attention(query, key, value, causal=causal, scale=scale)
    mask = mask[:, None, None] if mask.ndim == 2 else mask
    seen = mask if mask.dtype == torch.bool else mask > -1000
    seen = seen[:, 0].expand(len(query), query.shape[2], key.shape[2])
    rows = [_one(query[b, None], key[b, None], value[b, None], seen[b], scale) for b in range(len(query))]
    return torch.cat(rows)


def _one(query, key, value, seen, scale):
    """One sequence; `seen` [Lq, Lk] says which query sees which key."""
    some = seen.any(1)
    keys, place = seen.any(0), torch.arange(seen.shape[1])
    options = {"scale": scale, "key_mask": keys[None]}
    if not torch.equal(seen[some], keys.expand(int(some.sum()), -1)):
        first, last = (torch.stack([edge(place[row]) for row in seen[some]]) for edge in (torch.min, torch.max))
        options["bounds"] = (first[None], last[None])
    out = torch.zeros_like(query, dtype=torch.float64)
    out[:, :, some] = oracle_attention(query[:, :, some], key, value, **options)
    return out
