"""The GPT of Crystal (arXiv 2411.04156, sizes and numbers from its released configuration), at any size.

What is unusual in it, for someone who knows GPT-2 or Llama:
- muP (arXiv 2203.03466, with BTLM's numbers, arXiv 2309.11568): embeddings times 14.6, logits times 2.22 * 256 / width,
  attention scaled by 1/head_dim, matrix init ~ 1/sqrt(width) and matrix learning rate ~ 1/width, so that the best
  learning rate found at width 256 serves at every width. `mup_base=0` turns all of it off.
- LayerNorm, not RMSNorm (`norm`), and no biases (`bias`; Crystal 7B has them everywhere but in the head).
- Rotary positions on the first quarter of each head's channels (`rotary`), the rest carry no position.
- One tied matrix for input and output (`tie`), its rows padded to what GPUs like; padding gets no probability.
- `parallel` sums attention and MLP of one norm, as in To Code, or Not To Code (arXiv 2408.10914) and GPT-J.
- The residual is added inside the norm, and head and loss are one operation (`kernels/`); `forward` returns the loss.
- Weights stay fp32; products and the residual stream are in `dtype`, by casts where they are used, without autocast;
  `accumulating` casts once for several micro-steps, and sums their gradients in fp32.
- Every parameter is drawn from a generator named after it: the same weights on one device, on many, or born on `meta`.

    model = GPT(GPTConfig(**PRESETS["nano"])); init_weights(model, seed=1)
    loss, token_loss, lse_sq = model(tokens, targets)
"""

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import UserError
from kernels import add_norm, attention, dense_mask, linear_ce, rope_qkv_, rope_tables, swiglu
from kernels.product import Product

# Parameters with the 32,064 ids of the shipped tokenizer, except nano (8,192 ids) and 7B (Crystal's own 32,032).
PRESETS = {
    "nano": dict(n_layer=4, n_head=4, n_embd=256, block_size=256),  # 5.2M, trains on a laptop
    "30M": dict(n_layer=10, n_head=6, n_embd=384, block_size=512),
    # Heads of 128 channels from here on, with which attention is reported to be faster on Hopper; GPT-3's two smaller
    # models had 64 (arXiv 2005.14165, Table 2.1).
    "124M": dict(n_layer=12, n_head=6, n_embd=768, block_size=1024),  # GPT-2 small: 124M with its 50k words
    "350M": dict(n_layer=24, n_head=8, n_embd=1024, block_size=2048),
    "1.3B": dict(n_layer=24, n_head=16, n_embd=2048, block_size=2048),
    # Crystal itself: 6,575,278,720. Its MLP width and vocabulary are kept although GPUs dislike 10922 and 32032.
    "7B": dict(n_layer=32, n_head=32, n_embd=4096, block_size=2048, n_inner=10922, vocab_size=32032, bias=True),
}
EMBEDDING_SCALE, LOGIT_SCALE, SIGMA = 14.6, 2.22, 0.073  # muP constants of BTLM and Crystal, at base width
LARGEST = 1 << 24  # of any whole number in GPTConfig: beyond it is a slip, of which building a model would never end


@dataclass
class GPTConfig:
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    block_size: int = 256  # longest context, in tokens
    vocab_size: int = 8192  # rows of the embedding
    vocab_real: int = 0  # ids the tokenizer has; 0: all rows. Later rows are padding
    n_inner: int = 0  # width of the MLP; 0: 8/3 n_embd, up to a multiple of 64
    norm: str = "layernorm"  # or rmsnorm
    bias: bool = False
    tie: bool = True
    rotary: float = 0.25  # share of each head's channels that rotate
    parallel: bool = False
    mup_base: int = 256  # width from which muP scales; 0: standard parametrisation

    def __post_init__(self):
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name not in ("vocab_real", "n_inner", "mup_base"))
            if type(value) not in ((int, float) if field.type is float else (field.type,)):
                raise ValueError(f"{field.name} = {value!r} is not of type {field.type.__name__}")
            if field.type is int and not least <= value <= LARGEST:
                raise ValueError(f"{field.name} = {value:,} is not from {least} to {LARGEST:,}")
        self.n_inner = self.n_inner or -(-(8 * self.n_embd // 3) // 64) * 64
        self.vocab_real = self.vocab_real or self.vocab_size
        if self.vocab_real > self.vocab_size:
            raise ValueError(f"vocab_real = {self.vocab_real} is more than vocab_size = {self.vocab_size}")
        if self.n_layer > 1024:  # building so many takes minutes, and nobody has trained them
            raise ValueError(f"n_layer = {self.n_layer:,} is more than 1,024")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")
        if not 0 <= self.rotary <= 1 or self.rotary_dim % 2:
            raise ValueError(f"rotary = {self.rotary} of head_dim {self.head_dim} is not an even number of channels")
        if self.norm not in ("layernorm", "rmsnorm"):
            raise ValueError(f"norm = {self.norm!r} is not layernorm or rmsnorm")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def rotary_dim(self):
        return int(self.head_dim * self.rotary)

    @property
    def width_ratio(self):
        """Base width over width: the factor by which muP shrinks logits and hidden learning rates."""
        return self.mup_base / self.n_embd if self.mup_base else 1.0


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever its weights are stored in."""

    copy = None  # of the weight in that dtype, inside `accumulating`

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.copy is None:
            return F.linear(x, self.weight.to(x.dtype), bias)
        return Product.apply(x, self.weight, bias, self.copy, self.weight.grad)


@contextlib.contextmanager
def accumulating(model, dtype):
    """For the micro-steps of one batch, between which no weight may change: casts the matrices of all Linears to dtype
    once, sets their gradients to 0, and has every backward pass add to these in fp32, not rounded to dtype before.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    weights = [layer.weight.detach() for layer in layers]
    copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    grads = [torch.empty_like(weight) for weight in weights]
    torch._foreach_copy_(copies, weights)
    torch._foreach_zero_(grads)
    for layer, copy, grad in zip(layers, copies, grads, strict=True):
        layer.copy = copy
        layer.weight.grad = grad
    try:
        yield
    finally:
        for layer in layers:
            del layer.copy


class Norm(nn.Module):
    """Add a branch to the residual stream and normalise the sum; see kernels/norm.py."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        with_bias = config.bias and config.norm == "layernorm"
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if with_bias else None
        self.rms = config.norm == "rmsnorm"

    def forward(self, branch, residual):
        return add_norm(branch, residual, self.weight, self.bias, eps=1e-5, rms=self.rms)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, F_, bias = config.n_embd, config.n_inner, config.bias
        self.n_head, self.head_dim, self.parallel = config.n_head, config.head_dim, config.parallel
        self.scale = 1 / self.head_dim if config.mup_base else self.head_dim**-0.5
        self.ln_1 = Norm(config)
        self.qkv = Linear(C, 3 * C, bias=bias)
        self.attn_out = Linear(C, C, bias=bias)
        self.ln_2 = None if config.parallel else Norm(config)
        self.gate_up = Linear(C, 2 * F_, bias=bias)
        self.mlp_out = Linear(F_, C, bias=bias)

    def attend(self, x, cos, sin, cache, mask, pos):
        B, T, C = x.shape
        # flat, so that the product is one mm, and recomputation that would keep it sees it being turned in place;
        # a product of three dimensions hides that behind a view
        qkv = self.qkv(x.flatten(0, 1)).view(B, T, 3, self.n_head, self.head_dim)
        q, k, v = rope_qkv_(qkv, cos, sin, pos=pos)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        y = attention(q, k, v, scale=self.scale, mask=mask)
        return self.attn_out(y.transpose(1, 2).reshape(B, T, C))

    def mlp(self, x):
        return self.mlp_out(swiglu(self.gate_up(x)))

    def forward(self, branch, residual, cos, sin, cache=None, mask=None, pos=None):
        """branch (B, T, C) is what the layer before has still to add to residual (B, T, C). Returns the same pair."""
        x, residual = self.ln_1(branch, residual)
        if self.parallel:
            return self.attend(x, cos, sin, cache, mask, pos) + self.mlp(x), residual
        x, residual = self.ln_2(self.attend(x, cos, sin, cache, mask, pos), residual)
        return self.mlp(x), residual


class KVCache:
    """Keys and values of the positions already read, (B, H, length, D) a block, for `generate`."""

    def __init__(self, length):
        self.length, self.used, self.kv = length, 0, {}

    def extend(self, block, k, v):
        if block not in self.kv:
            B, H, _, D = k.shape
            self.kv[block] = k.new_empty(2, B, H, self.length, D)
        end = self.used + k.shape[2]
        self.kv[block][:, :, :, self.used : end] = torch.stack((k, v))
        return self.kv[block][:, :, :, :end]


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        C, V = config.n_embd, config.vocab_size
        self.embedding_scale = EMBEDDING_SCALE if config.mup_base else 1.0
        self.logit_scale = LOGIT_SCALE * config.width_ratio if config.mup_base else 1.0
        self.wte = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = Norm(config)
        self.head = None if config.tie else nn.Linear(C, V, bias=False)
        cos, sin = rope_tables(config.block_size, config.rotary_dim)
        self.register_buffer("cos", cos, persistent=False)  # (block_size, rotary_dim / 2) fp32
        self.register_buffer("sin", sin, persistent=False)

    def init_tables(self):
        """Fill what is no parameter and in no checkpoint, after `to_empty`."""
        cos, sin = rope_tables(self.config.block_size, self.config.rotary_dim)
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    @property
    def head_weight(self):
        return self.wte.weight if self.head is None else self.head.weight

    def hidden(self, tokens, cache=None, mask=None, pos=None):
        """tokens (B, T) int64 -> final normalised states (B, T, C) in `dtype`.

        mask: of kernels.batch_mask or dense_mask, None: causal. pos: (B, T) int64 positions below block_size, None:
        those after the cache's.
        """
        start = cache.used if cache else 0
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} positions asked of a model with block_size {self.config.block_size}")
        cos, sin = (self.cos[start:end], self.sin[start:end]) if pos is None else (self.cos, self.sin)
        branch, residual = (self.wte(tokens) * self.embedding_scale).to(self.dtype), None
        for block in self.blocks:
            branch, residual = block(branch, residual, cos, sin, cache, mask, pos)
        if cache:
            cache.used = end
        return self.ln_f(branch, residual)[0]

    def logits(self, x):
        """x (..., C) -> fp32 logits (..., vocab_real)."""
        weight = self.head_weight[: self.config.vocab_real].to(x.dtype)
        return F.linear(x, weight).float() * self.logit_scale

    def forward(self, tokens, targets=None, z_coef=0.0, divisor=None, mask=None, pos=None):
        """tokens, targets: (B, T) int64, target -1 is not trained on. Without targets: logits (B, T, vocab_real), fp32.
        mask, pos: as in `hidden`.

        With targets: (loss, token_loss (B, T), lse_sq_sum) of kernels/linear_ce.py.
        """
        x = self.hidden(tokens, mask=mask, pos=pos)
        if targets is None:
            return self.logits(x)
        loss, token_loss, lse_sq_sum = linear_ce(
            x.flatten(0, 1), self.head_weight, targets.flatten(), self.logit_scale, z_coef,
            vocab_real=self.config.vocab_real, divisor=divisor,
        )  # fmt: skip
        return loss, token_loss.view_as(targets), lse_sq_sum

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_p=1.0, stop=None, generator=None, allow=None):
        """Continue prompts, lists of ids, side by side; yields at every step a list of one id a prompt, None for those
        that have come to `stop`, until all have or max_new_tokens.

        temperature 0 takes the likeliest token. top_p keeps the smallest set of tokens that holds that much probability
        (nucleus sampling, arXiv 1904.09751). allow: for every prompt a function of the ids made for it so far to what
        may come next, bool (vocab_real or more,), or None for anything. Contexts that outgrow block_size are re-read
        from their later half. UserError if the model has diverged.
        """
        texts, over, cache = [[*prompt] for prompt in prompts], [False] * len(prompts), None
        length, device = self.config.block_size, self.wte.weight.device
        for _ in range(max_new_tokens):
            if cache is None or cache.used == length:
                keep = length if cache is None else length // 2
                cache, read = KVCache(length), [text[-keep:] for text in texts]
                longest = max(map(len, read))
                padding = torch.tensor([longest - len(ids) for ids in read], device=device)[:, None]
                fresh = torch.tensor([[0] * (longest - len(ids)) + ids for ids in read], device=device)
                even = not padding.any()
            where = {} if even else self.after_padding(padding, cache.used, cache.used + fresh.shape[1])
            logits = self.logits(self.hidden(fresh, cache, **where)[:, -1])
            if not logits.max(dim=1).values.isfinite().all():
                raise UserError("the model's logits are NaN or infinite: its training has diverged")
            for row, rule in enumerate(allow or ()):
                if (allowed := rule(texts[row][len(prompts[row]) :])) is not None:
                    logits[row, ~allowed[: logits.shape[1]].to(device)] = float("-inf")
            fresh = sample(logits, temperature, top_p, generator)
            ids = fresh[:, 0].tolist()
            over = [done or token == stop for done, token in zip(over, ids, strict=True)]
            if all(over):
                return
            for text, token in zip(texts, ids, strict=True):
                text.append(token)
            yield [None if done else token for done, token in zip(over, ids, strict=True)]

    def after_padding(self, padding, begin, end):
        """Mask and positions of columns begin .. end - 1 of rows whose first `padding` (B, 1) columns hold nothing."""
        q, k = torch.arange(begin, end, device=padding.device)[:, None], torch.arange(end, device=padding.device)
        seen = (k <= q) & ((k >= padding[:, None]) | (k == q))  # what holds nothing sees itself, or would be NaN
        return {"mask": dense_mask(seen[:, None], self.dtype, True), "pos": (q.T - padding).clamp(min=0)}

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """6 N + 12 L d T: a multiply-add forward and two backward per weight, and attention over the full square.

        N leaves out an untied input embedding, which is looked up; a tied one counts once, as the head (PaLM, App. B).
        """
        c = self.config
        n = self.num_params() - (0 if c.tie else self.wte.weight.numel())
        return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size


def sample(logits, temperature, top_p, generator=None):
    """logits (B, V) -> one id a row, (B, 1)."""
    if temperature < 1e-6:  # below, quotients overflow
        return logits.argmax(dim=-1, keepdim=True)
    probability, word = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    probability[probability.cumsum(-1) - probability >= top_p] = 0.0  # the word that crosses top_p stays
    return word.gather(-1, torch.multinomial(probability, 1, generator=generator))


def kind(name):
    """embedding, hidden or other (norms and all biases): the three ways muP treats a parameter, from its name."""
    if name.startswith(("wte.", "head.")):
        return "embedding"
    return (
        "hidden"
        if name.startswith("blocks.") and name.endswith(("qkv.weight", "_out.weight", "up.weight"))
        else "other"
    )


def init_weights(model, seed, part=lambda whole, p: whole, threads=1):
    """Fill every parameter in place; works after `to_empty` from the meta device as well. part: what of a whole tensor
    parameter p holds, if this process has only a shard of it. threads: tensors drawn at a time.

    | parameter                       | muP                                | standard (mup_base = 0) |
    |---------------------------------|------------------------------------|-------------------------|
    | embedding, untied head          | 0.073                              | 0.02                    |
    | qkv, gate_up                    | 0.073 * sqrt(base / width)         | 0.02                    |
    | attn_out, mlp_out               | the line above / sqrt(2 * n_layer) | the same                |
    | norm weights; every bias        | 1; 0                               | 1; 0                    |

    Standard deviations of normals cut at two sigma and not rescaled, so that 0.88 of these remain (Crystal's configs).
    Each tensor is drawn on the CPU from a generator seeded by (seed, name).
    """
    c = model.config
    sigma = SIGMA if c.mup_base else 0.02

    @torch.no_grad()  # inside, because every thread has its own mode
    def fill(named):
        name, p = named
        if kind(name) == "other":
            p.fill_(1.0 if name.endswith("weight") else 0.0)
            return
        std = sigma if kind(name) == "embedding" else sigma * c.width_ratio**0.5
        if name.endswith("_out.weight"):
            std /= (2 * c.n_layer) ** 0.5
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        whole = nn.init.trunc_normal_(torch.empty(p.shape), 0.0, std, -2 * std, 2 * std, generator=generator)
        p.copy_(part(whole, p))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, model.named_parameters()))  # raises what one of them raised
    model.init_tables()


def param_groups(model, weight_decay):
    """Groups for AdamW: `lr_scale` multiplies the phase's learning rate (Crystal, get_mup_param_groups).

    Hidden matrices: base / width, decayed. Embedding and untied head: 1, decayed. Norms and all biases: 1, not decayed.
    """
    groups = {
        "hidden": dict(params=[], lr_scale=model.config.width_ratio, weight_decay=weight_decay),
        "embedding": dict(params=[], lr_scale=1.0, weight_decay=weight_decay),
        "other": dict(params=[], lr_scale=1.0, weight_decay=0.0),
    }
    for name, p in model.named_parameters():
        groups[kind(name)]["params"].append(p)
    return list(groups.values())
