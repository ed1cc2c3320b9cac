"""A GPT in pure JAX: parameters, layers, loss, Adam, training loop, generation.

    python gpt.py                  # trains on data/ (made if missing), writes out/base.npz
    python gpt.py --n_layer 6 --learning_rate 2e-3
    python gpt.py --resume         # goes on after Ctrl-C or a power cut

Read it from top to bottom. Four ideas carry it: a model is nested dicts of arrays; one attention
head is written for one sequence and jax.vmap makes all heads of all sequences of it; jax.grad
derives the backward pass; jax.jit compiles. In shapes: B batch, T time (tokens), S time of keys
and values, V vocabulary, C width, H heads, D = C / H. Small helpers stand at the end of prepare.py.
"""
import csv, ctypes, json, math, os, re, shutil, sys, time, zlib
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import prepare
from prepare import CONTEXT, CORES, END, InputError, Tokenizer, printable, read_flags, run, say
from prepare import clock, draw, keep_previous, only_writer, setting
from prepare import show_progress, whole_file, wishes_to_stop

# Skip this at first; it must come before jax is imported. Each CPU core becomes a device, for small
# matrix products run faster on one core each than spread over all of them. The last line is for
# Apple's jax-metal.
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={CORES} {flags}"
os.environ.setdefault("ENABLE_PJRT_COMPATIBILITY", "1")

# Skip this, too. glibc gives large buffers back to the system, and jax before 0.12 asks for them
# anew in each step. Keeping them makes a step a third shorter. Other systems have no mallopt.
with suppress(AttributeError, OSError, TypeError):
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-2, 1 << 26)  # M_TOP_PAD

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# ---------------------------------------------------------------- settings: each is a flag
# setting(default, help, lowest, highest) and CONTEXT, 64 tokens, stand in prepare.py.
@dataclass(frozen=True)
class Config:
    # the model
    n_layer: int = setting(3, "transformer blocks", low=1)
    n_head: int = setting(4, "attention heads in a block", low=1)
    n_embd: int = setting(128, "width: numbers that stand for a token", low=1)
    block_size: int = setting(CONTEXT, "context: tokens the model sees at once", low=1)
    dropout: float = setting(0.0, "part of the activations set to 0 in training", high=0.9)
    dtype: str = setting("auto", "of products with weights; auto: bfloat16 on CPUs that have it",
                         choices=["auto", "float32", "bfloat16"])
    # the optimiser
    batch_size: int = setting(16, "sequences in a micro-batch", low=1)
    grad_accum: int = setting(1, "micro-batches in a step", low=1)
    max_steps: int = setting(2700, "optimiser steps", low=1)
    minutes: float = setting(0.0, "train for about so long: sets max_steps from the speed seen")
    learning_rate: float = setting(8e-3, "at its peak; then along a cosine to 0")
    warmup: float = setting(0.05, "part of the steps in which the rate rises to its peak", high=0.9)
    weight_decay: float = setting(0.6, "of matrices")  # much, against learning by heart
    grad_clip: float = setting(1.0, "largest norm of the whole gradient; 0 means never clip")
    seed: int = setting(0, "of parameters, batches and dropout", high=2**32 - 1)
    # the run
    eval_every: int = setting(500, "steps between validations, which also save; 0 means never")
    log_every: int = setting(10, "steps between rows of log.csv", low=1)
    data_dir: str = setting("data", "folder with train.bin, val.bin and tokenizer.json")
    out_dir: str = setting("out", "folder for checkpoints and log.csv")
    init: str = setting("", "checkpoint to take the parameters from")
    resume: bool = setting(False, "go on from the last checkpoint in out_dir")
    # many devices
    shard_params: bool = setting(False, "split parameters and Adam's moments over the devices")
    coordinator: str = setting("", "HOST:PORT of process 0; SLURM and Cloud TPU need none")
    num_processes: int = setting(1, "how many processes there are on all hosts", low=1)
    process_id: int = setting(0, "which of them this one is, from 0")
    vocab_size: int = 0  # the tokenizer's, not a flag

SCRIPTS = {"base": "gpt.py", "chat": "sft.py", "dpo": "sft.py --dpo"}  # by what they write

def device():
    """The device that arrays go to by default; jax.default_device(...) sets another."""
    return jax.config.jax_default_device or jax.devices()[0]

def on_metal():
    """Whether that is Apple's GPU: its plug-ins lack some operations, and the code does without."""
    return device().platform.lower() in ("metal", "mps", "mtl")

def tokens_a_step(cfg):
    return cfg.batch_size * cfg.grad_accum * cfg.block_size

# ---------------------------------------------------------------- parameters: nested dicts
def init_params(cfg, rng=None):
    """The parameters as nested dicts of float32 arrays: gains are 1, matrices normal. rng: NumPy's
    generator, so that all versions of JAX begin alike; without one all matrices are zero:
    load_checkpoint only wants the shapes."""
    C = cfg.n_embd
    # Matrices that read the residual stream (x in forward) begin with the scale 1 / sqrt(C), which
    # makes products about as large as what is multiplied. Those that add to the stream, and the
    # embedding, begin small: then a block begins as nearly the identity.
    reads, adds = 1 / math.sqrt(C), 0.02

    def normal(scale, *shape):
        return np.float32(rng.normal(0, scale, shape) if rng else np.zeros(shape))

    def block():
        return {  # the keys are the names of what attention() and feed_forward() take
            "norm1": np.ones(C, np.float32),
            "attn": {"wqkv": normal(reads, C, 3 * C), "wo": normal(adds, C, C)},
            "norm2": np.ones(C, np.float32),
            "mlp": {"w_up": normal(reads, C, 4 * C), "w_down": normal(adds, 4 * C, C)},
        }

    blocks = [block() for _ in range(cfg.n_layer)]
    # The token embedding is the output layer too: small numbers give a first loss near ln V.
    wte = normal(adds, cfg.vocab_size, C)
    return {"wte": wte, "blocks": blocks, "norm": np.ones(C, np.float32)}

# ---------------------------------------------------------------- layers: pure functions
def lookup(table, ids):
    """table (N, C), ids (...) -> (..., C)."""
    if on_metal():  # it has no usable gradient of table[ids]
        return jax.nn.one_hot(ids, len(table)) @ table
    return table[ids]

def matmul(x, w, cfg, axis=0):
    """x (..., M) times a weight matrix w (M, N) -> (..., N). With axis=1 w is (N, M): so is the
    embedding when it is the output layer."""
    if cfg.dtype == "bfloat16" and not on_metal():
        return rounded_matmul(x, w, axis)  # the same with rounded numbers, see below
    return jnp.tensordot(x, w, (-1, axis))  # sums over the last axis of x and this axis of w

def norm(x, gain=1.0):
    """Root mean square normalisation (arXiv 1910.07467) of the last axis: (..., C) -> (..., C)."""
    mean_square = (x * x).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6) * gain

def rotate(x, position, cfg):
    """Rotary positions (arXiv 2104.09864): x (B, H, T, D), position (B or 1, T) -> like x.
    Number i and number i + D/2 make a pair, which is turned by position / 10000^(2i/D) radians:
    the first pair by 1 for each position, the last by hardly anything. Queries and keys are turned,
    and the product of two of them then depends on how far apart they are, not on where."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-np.arange(half) / half)
    angle = np.arange(cfg.block_size)[:, None] * frequency  # (block_size, D/2)
    cos = lookup(jnp.float32(np.cos(angle)), position)[:, None]  # (B or 1, 1, T, D/2)
    sin = lookup(jnp.float32(np.sin(angle)), position)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

def drop(x, cfg, key, number):
    """Dropout, the number-th in the model; without a key, as in evaluation, nothing is dropped."""
    if key is None or cfg.dropout == 0:
        return x
    key = jax.random.fold_in(key, number)
    keep = jax.random.bernoulli(key, 1 - cfg.dropout, x.shape)
    return jnp.where(keep, x / (1 - cfg.dropout), 0)

def head(q, k, v, allowed):
    """One attention head of one sequence (arXiv 1706.03762, eq. 1): q (T, D), k and v (S, D),
    allowed (T, S) -> (T, D). The only place where tokens see each other."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e9))  # finite: -inf is NaN on Metal
    return weights @ v

# All heads of one sequence: q (H, T, D), k and v (H, S, D). They share `allowed`, hence None.
heads = jax.vmap(head, (0, 0, 0, None))
QUERIES = 128  # more than the default context, which is done in one part

def causal_heads(q, k, v):
    """Each token sees itself and those before it: q, k, v (H, T, D) -> (H, T, D). In short:

        heads(q, k, v, np.tri(T, dtype=bool))

    In a long context 128 queries at a time are compared with the keys up to the last of them: half
    the work. jax.checkpoint saves memory: jax.grad computes the weights again instead of keeping
    them."""
    T = q.shape[1]
    # XLA must not merge that second computation with the first; Metal lacks the barrier for it.
    some_heads = jax.checkpoint(heads, prevent_cse=not on_metal())
    parts = []
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        # Row i is query start + i, which sees the keys up to start + i.
        allowed = np.tri(end - start, end, start, dtype=bool)
        parts.append(some_heads(q[:, start:end], k[:, :end], v[:, :end], allowed))
    return jnp.concatenate(parts, axis=1)

def cached_heads(q, k, v, position, cache, cfg):
    """In generation, skip it until make_generator: one new token for each sequence, at position
    (B, 1): q, k, v (B, H, 1, D) -> the heads' output like q, keys and values (B, H, S, D). The
    cache has a slot for each of the S = block_size positions. The first pass has filled all, with
    the prompt and padding. The token's key and value go into its own slot, and it sees the slots up
    to there: a slot with padding is overwritten before a token sees it."""
    slots = np.arange(cfg.block_size)[None]  # (1, S)
    is_own = (slots == position)[:, None, :, None]  # (B, 1, S, 1)
    k = jnp.where(is_own, k, cache[0])
    v = jnp.where(is_own, v, cache[1])
    allowed = (slots <= position)[:, None]  # (B, 1, S)
    return jax.vmap(heads)(q, k, v, allowed), k, v

def attention(x, wqkv, wo, position, cache, cfg):
    """(B, T, C) -> (B, T, C), and the keys and values (B, H, S, D) that later tokens look at."""
    B, T, C = x.shape

    def to_heads(z):  # (B, T, C) -> (B, H, T, D)
        return z.reshape(B, T, cfg.n_head, -1).transpose(0, 2, 1, 3)

    q, k, v = map(to_heads, jnp.split(matmul(x, wqkv, cfg), 3, axis=-1))
    # Queries and keys are normalised, which learns faster (arXiv 2010.04245). With a gain of 1.2
    # scores go up to 1.2 * 1.2 * D / sqrt(D), enough to look at one token alone.
    q = norm(rotate(q, position, cfg), 1.2)
    k = norm(rotate(k, position, cfg), 1.2)
    if cache is None:  # in training; and in generation at first, for whole prompts
        y = jax.vmap(causal_heads)(q, k, v)
    else:
        y, k, v = cached_heads(q, k, v, position, cache, cfg)
    y = y.transpose(0, 2, 1, 3).reshape(B, T, C)
    return matmul(y, wo, cfg), (k, v)

def feed_forward(x, w_up, w_down, cfg):
    """Two matrices with a squared ReLU between them (arXiv 2109.08668): (B, T, C) -> (B, T, C)."""
    up = jax.nn.relu(matmul(x, w_up, cfg))
    return matmul(up * up, w_down, cfg)

# ---------------------------------------------------------------- model and loss
def forward(params, tokens, cfg, key=None, position=None, cache=None):
    """tokens (B, T) -> the residual stream after the last block (B, T, C), and the keys and values
    of all blocks. With a cache, tokens (B, 1) stand at position (B, 1), else from 0 on."""
    if cache is None:
        position = np.arange(tokens.shape[1])[None]  # (1, T)
        cache = [None] * cfg.n_layer
    # Without norm the small numbers of wte would soon be lost among what the blocks add to them.
    x = drop(norm(lookup(params["wte"], tokens)), cfg, key, 0)
    new_cache = []
    for i, block in enumerate(params["blocks"]):
        y, kv = attention(norm(x, block["norm1"]), **block["attn"], position=position,
                          cache=cache[i], cfg=cfg)
        x = x + drop(y, cfg, key, 2 * i + 1)
        y = feed_forward(norm(x, block["norm2"]), **block["mlp"], cfg=cfg)
        x = x + drop(y, cfg, key, 2 * i + 2)
        new_cache.append(kv)
    return x, new_cache

def logits_of(params, x, cfg):
    """(..., C) -> (..., V), scores of the next token: the output layer is the embedding again."""
    return matmul(norm(x, params["norm"]), params["wte"], cfg, axis=1)

def token_losses(params, x, y, cfg, key=None):
    """Cross-entropy in nats of each token: x, y (B, T) -> (B, T)."""
    logits = logits_of(params, forward(params, x, cfg, key)[0], cfg)
    logp = jax.nn.log_softmax(logits)
    return -(logp * jax.nn.one_hot(y, cfg.vocab_size)).sum(-1)  # a gather would fail on Metal

def loss(params, batch, key, cfg):
    """x, y (B, T) int32, w (B, T) float32 -> (sum of w times the tokens' losses, sum of w). w is 1
    for a token that counts; of conversations only those of answers do. No mean: micro-batches and
    devices with unequal numbers of them then add up to the right gradient."""
    x, y, w = batch
    return (token_losses(params, x, y, cfg, key) * w).sum(), w.sum()

# ---------------------------------------------------------------- bfloat16: skip it at first
def rounded(a, b, axes):
    """A product of numbers rounded to bfloat16, summed in float32."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.tensordot(a, b, axes, preferred_element_type=np.float32)

@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rounded_matmul(x, w, axis):
    """matmul in bfloat16. The only gradient that is written by hand: jax.grad would multiply
    bfloat16 by float32, which is no faster than float32."""
    return rounded(x, w, (-1, axis))

def rounded_forward(x, w, axis):
    saved = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return rounded(x, w, (-1, axis)), saved

def rounded_backward(axis, saved, dy):
    # With axis=0: dx = dy w^T, dw = x^T dy; with axis=1: dx = dy w, dw = dy^T x. JAX passes what
    # has no gradient, axis, first.
    x, w = saved
    leading = list(range(x.ndim - 1))  # all axes but the last: the gradient of w is a sum over them
    a, b = (x, dy) if axis == 0 else (dy, x)
    dx = rounded(dy, w, (-1, 1 - axis))
    return dx, rounded(a, b, (leading, leading))

rounded_matmul.defvjp(rounded_forward, rounded_backward)

# ---------------------------------------------------------------- optimiser and step
def learning_rate(step, cfg):
    """Step (from 0) -> linear warm-up, then a cosine from the peak to 0 at max_steps:

    >>> cfg = Config(learning_rate=1.0, warmup=0.1, max_steps=100)
    >>> [round(learning_rate(step, cfg), 2) for step in (0, 9, 10, 55, 100)]
    [0.09, 0.91, 1.0, 0.5, 0.0]
    """
    warmup = cfg.warmup * cfg.max_steps
    if step < warmup:
        return cfg.learning_rate * (step + 1) / (warmup + 1)
    part = (step - warmup) / (cfg.max_steps - warmup)
    return cfg.learning_rate * (1 + math.cos(math.pi * part)) / 2

def new_state(params):
    """What a step changes: parameters, and Adam's means of the gradient (m) and its square (v)."""
    zeros = jax.tree.map(np.zeros_like, params)
    return {"params": params, "m": zeros, "v": zeros}

def adam(state, grads, t, rate, cfg, beta1=0.9, beta2=0.99):
    """Step t (from 1, as in the paper) of Adam (arXiv 1412.6980), with the gradient clipped to a
    global norm and with decoupled weight decay of matrices (arXiv 1711.05101)."""
    global_norm = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(grads)))
    scale = jnp.minimum(1, (cfg.grad_clip or math.inf) / (global_norm + 1e-6))
    grads = jax.tree.map(lambda g: g * scale, grads)
    m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state["m"], grads)
    v = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state["v"], grads)
    # Both means began at zero and are too small by 1 - beta^t (in this form for Metal's sake).
    correct1 = 1 - jnp.exp(t * math.log(beta1))
    correct2 = 1 - jnp.exp(t * math.log(beta2))

    def new_value(p, m, v):
        # v is 0 if there never was a gradient. Then nothing decays: sft.py holds some rows fixed.
        decay = jnp.where(v > 0, cfg.weight_decay * p, 0) if p.ndim > 1 else 0
        return p - rate * (m / correct1 / (jnp.sqrt(v / correct2) + 1e-8) + decay)

    return {"params": jax.tree.map(new_value, state["params"], m, v), "m": m, "v": v}

def placements(n_rows, devices=None):
    """Where arrays live, skip it at first -> (whole, split). whole: a copy on each device; split:
    the first axis is divided among them. For 16 rows it takes 2 of 3 devices, the largest number
    that divides them. jit adds what the devices must tell each other."""
    devices = devices or jax.devices(device().client)  # all of the default one's kind
    n = max(i for i in range(1, len(devices) + 1) if n_rows % i == 0)
    mesh = Mesh(np.array(devices[:n]), ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

def placements_of(state, cfg):
    """A tree like the state, skip it at first: where each array lives between steps. That is whole
    on every device or, with --shard_params, split along its last axis (ZeRO, arXiv 1910.02054)."""
    whole, _ = placements(cfg.batch_size)

    def placement(array):
        if cfg.shard_params and array.shape[-1] % whole.mesh.size == 0:
            return NamedSharding(whole.mesh, PartitionSpec(*[None] * (array.ndim - 1), "data"))
        return whole

    return jax.tree.map(placement, state)

def put(array, placement):
    """Put an array onto devices, like jax.device_put. Each process fills its own devices."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, placement, lambda part: array[part])

def make_step(objective, batch_at, cfg, placed):
    """-> step(state, number, rate), which does the number-th step (from 0) and returns the new
    state and the loss. objective(params, batch, key) gives (sum, count) of a micro-batch, and
    batch_at(n) the n-th micro-batch of the run. Micro-batches are added up, then divided once.

    In short, on one device and without micro-batches:

        gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))
        (total, count), grads = gradient(state["params"], batch, key)
        state = adam(state, each of grads / count, number + 1, rate, cfg)

    has_aux: of the pair that objective returns only the first is differentiated. All else says on
    which devices arrays lie: out_shardings where jit leaves its results, whole or split (see
    placements), and placed where the state lives, a placement for each of its arrays."""
    whole, split = placements(cfg.batch_size)
    gradient = jax.jit(
        jax.value_and_grad(objective, has_aux=True),
        out_shardings=((whole, whole), placed["params"]))  # as it returns ((sum, count), gradients)

    # The old state's memory is given ("donated") to the new one; Metal cannot do that.
    @partial(jax.jit, out_shardings=(placed, whole), donate_argnums=() if on_metal() else 0)
    def update(state, sums, t, rate):
        (total, count), grads = sums
        count = jnp.maximum(count, 1)
        mean = jax.tree.map(lambda g: g / count, grads)
        return adam(state, mean, t, rate, cfg), total / count

    def step(state, number, rate):
        sums = None
        for n in range(number * cfg.grad_accum, (number + 1) * cfg.grad_accum):
            batch = []
            for array in batch_at(n):
                # With DPO there are more rows than batch_size, which may not divide evenly.
                divides = len(array) % whole.mesh.size == 0
                batch.append(put(array, split if divides else whole))
            key = np.array([cfg.seed, n], np.uint32)  # two numbers, as jax.random takes them
            new = gradient(state["params"], batch, key)
            jax.block_until_ready(new)  # two at once can block each other on virtual CPU devices
            sums = jax.tree.map(jnp.add, sums, new) if sums else new
        return update(state, sums, np.float32(number + 1), np.float32(rate))

    return step

# ---------------------------------------------------------------- batches
def load_tokens(path, tokenizer, at_least):
    """Memory-mapped ids of train.bin or val.bin, two bytes each, checked."""
    size = path.stat().st_size
    if size < 2 * at_least:
        raise InputError(f"{path}: {size // 2} tokens, {at_least} needed;"
                         " use more text or a smaller --block_size")
    ids = np.memmap(path, "<u2", "r", shape=size // 2)
    if size % 2 or ids.max() >= tokenizer.size:
        raise InputError(f"{path}: damaged, or of another vocabulary; run prepare.py again")
    return ids

def random_batch(ids, n, T, seed, number):
    """The number-th batch -> x, y (n, T) int32, w (n, T) of ones: a function of (seed, number), so
    that a resumed run sees the same. For each row a place in ids is drawn, where it begins. But if
    there is an <|end|> at that place or less than T / 2 tokens before it, it begins with that:

        ids   ... y z <|end|> a b c d e f g h i j ...      T = 8, drawn: c
        x             <|end|> a b c d e f g
        y                     a b c d e f g h

    So a document's first tokens are mostly seen with all that they follow from. In documents longer
    than T the very first are targets up to 1.5 times as often as others, those just behind the T-th
    down to half as often. In a row with two documents the second sees the first."""
    rows = []
    for start in np.random.default_rng([seed, number]).integers(len(ids) - T, size=n):
        earliest = max(0, start + 1 - T // 2)
        ends_before = earliest + np.flatnonzero(ids[earliest:start + 1] == END)
        if len(ends_before):
            row = ids[ends_before[-1]:][:T + 1]
        elif earliest == 0:  # near the beginning of ids, which has no <|end|> in front
            row = np.append(END, ids[:T])
        else:
            row = ids[start:][:T + 1]
        rows.append(row)
    batch = np.array(rows, np.int32)
    x, y = batch[:, :-1], batch[:, 1:]
    return x, y, np.ones((n, T), np.float32)

def make_validation(ids, tokenizer, cfg):
    """-> a function of the parameters: (nats a token, bits a byte) over 65,536 targets at most."""
    ids = np.array(ids[:65537], np.int32)
    n_tokens = len(ids) - 1
    n_bytes = sum(len(tokenizer.bytes[id]) for id in ids[1:])  # <|end|> has none
    n, T = 4 * cfg.batch_size, cfg.block_size  # without gradients more rows fit
    # Whole batches; what fills up the last one does not count.
    shape = (-(-n_tokens // (n * T)), n, T)
    x = np.resize(ids[:-1], shape)  # repeats ids to fill the shape
    y = np.resize(ids[1:], shape)
    w = np.float32(np.arange(x.size) < n_tokens).reshape(shape)
    whole, split = placements(cfg.batch_size)
    loss_of = jax.jit(partial(loss, key=None, cfg=cfg), out_shardings=whole)

    def validate(params):
        nats = 0
        for batch in zip(x, y, w):
            total, _ = loss_of(params, [put(a, split) for a in batch])
            nats += float(total)
        return nats / n_tokens, nats / math.log(2) / max(1, n_bytes)

    return validate

# ---------------------------------------------------------------- generation
def sample(logits, history, rng, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """Logits (V,) of the next token -> an id. Temperature 0 takes the likeliest; top_k keeps the k
    likeliest, top_p the fewest that together have probability p (arXiv 1904.09751); the penalty
    lowers tokens that are in `history` already (arXiv 1909.05858).

    >>> logits = [1.0, 3.0, 2.0]
    >>> sample(logits, [], None), sample(logits, [1], None, repetition_penalty=2.0)
    (1, 2)
    """
    logits = np.array(logits, np.float64)
    if repetition_penalty != 1:
        seen = np.unique(history)
        logits[seen] *= np.where(logits[seen] > 0, 1 / repetition_penalty, repetition_penalty)
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    p = np.exp((logits[order] - logits[order[0]]) / temperature)
    p /= p.sum()
    # A token stays while those before it sum to less than top_p; the factor is for rounding errors.
    keep = np.cumsum(p) - p <= top_p * (1 - 1e-9)
    order, p = order[keep], p[keep]
    return int(rng.choice(order, p=p / p.sum()))

def make_generator(cfg):
    """-> generate(params, prompts, max_new_tokens, rng, **how). prompts: lists of ids; how: see
    sample(). It yields in each step the new ids, END for a row that has ended, and the logits
    (B, V) they were chosen by. A row that fills the context goes on from its last half."""
    cfg = replace(cfg, dtype="float32")  # rounding all weights for a token is slower
    T = cfg.block_size

    @jax.jit
    def logits_after(params, tokens, position, cache):
        """-> logits (B, V) of what follows the last token of each row, at position (B, 1), and the
        new cache. tokens: the last ones (B, 1) or, without a cache, padded rows (B, T)."""
        if cache is None:
            x, new_cache = forward(params, tokens, cfg)  # x (B, T, C)
            is_last = jax.nn.one_hot(position[:, 0], T)  # (B, T)
            x = (x * is_last[..., None]).sum(1)  # x[i, position[i]] for each i, as Metal can do it
        else:
            x, new_cache = forward(params, tokens, cfg, position=position, cache=cache)
            x = x.reshape(len(x), -1)  # (B, 1, C) -> (B, C)
        return logits_of(params, x, cfg), new_cache

    def generate(params, prompts, max_new_tokens, rng, **how):
        # Each host generates for itself, on its own devices.
        whole, split = placements(len(prompts), jax.local_devices(backend=device().client))
        params = jax.device_put(params, whole)
        rows = [prompt[-T:] for prompt in prompts]
        new = [None] * len(rows)
        cache = None
        for _ in range(max_new_tokens):
            if max(map(len, rows)) > T:
                cache = None  # one is too long: all keys and values are computed anew
                half = T // 2 + 1  # not 0 where T is 1: row[-0:] would be all of it
                rows = [row if len(row) <= T else row[-half:] for row in rows]
            position = [[len(row) - 1] for row in rows]  # of the last token in each row
            if cache is None:
                # The row fills the first slots, padding the others. Each new token overwrites the
                # padding in its own slot (see cached_heads) and sees no later slot.
                tokens = [row + [END] * (T - len(row)) for row in rows]
            else:
                tokens = [row[-1:] for row in rows]
            inputs = [put(np.int32(ids), split) for ids in (tokens, position)]
            logits, cache = logits_after(params, *inputs, cache)
            logits = np.asarray(logits)
            new = [END if previous == END else sample(scores, row, rng, **how)
                   for previous, scores, row in zip(new, logits, rows)]
            rows = [[*row, id] for row, id in zip(rows, new)]
            yield new, logits
            if set(new) == {END}:
                return

    return generate

# ---------------------------------------------------------------- checkpoints
# A checkpoint has the state (arrays) and `about`, a dict that says of it:
#     kind         "base" or "chat"
#     config       settings of the run; tokenizer: the text of tokenizer.json
#     step         steps done; seconds: the time they took
#     log          a Row, below, for each line of log.csv
#     best         [step, nats, bits a byte] of the lowest validation; [0, None, None] at first
#     text, data   checksums of train.bin and of the examples
#     words        {word: how often it was in text and examples}; of a chat model
#     version      of the model: parameters mean nothing to another one's forward()
VERSION = 2  # since queries, keys and the embedding are normalised
MODEL_SETTINGS = {"n_layer", "n_head", "n_embd", "block_size", "dtype", "vocab_size"}

class Row(NamedTuple):
    """A line of log.csv; without a validation in this step its two numbers are None."""
    step: int
    train_loss: float
    val_loss: float
    val_bits_per_byte: float
    learning_rate: float
    tokens_per_second: int
    seconds: float

def named_leaves(tree):
    """Nested dicts and lists -> {"params.blocks.0.attn.wqkv": array, ...}"""
    return {".".join(re.findall(r"\w+", jax.tree_util.keystr(path))): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

def save_checkpoint(path, state, about):
    """One file with everything and no pickle: the arrays, and `about` as JSON."""
    arrays = named_leaves(state)
    if not all(np.isfinite(a).all() for a in arrays.values()):
        raise InputError(f"{path}: kept as it was, the parameters are no longer finite; go on from"
                         " it by --init, with a smaller --learning_rate")
    with whole_file(path) as file:
        text = json.dumps(about | {"version": VERSION})
        np.savez(file, about=np.array(text), **arrays)

def load_checkpoint(path, to_resume=False):
    """-> (state, about, the model's settings, tokenizer), all of it checked. Of the state only the
    "params", which will do for everything but to resume training."""
    try:
        with open(path, "rb") as raw, np.lib.npyio.NpzFile(raw) as file:
            about = json.loads(str(file["about"]))
            if about.get("version") != VERSION:
                raise ValueError("made by another version of gpt.py; train it anew")
            cfg = Config(**{name: about["config"][name] for name in MODEL_SETTINGS})
            state = {"params": init_params(cfg)}
            if to_resume:
                state = new_state(state["params"])
            found = []
            for name, like in named_leaves(state).items():
                a = file[name]
                fits = a.shape == like.shape and a.dtype == like.dtype
                if not fits or not np.isfinite(a).all():
                    raise ValueError(f"{name} is no finite float32 array of shape {like.shape}")
                found.append(a)
        tokenizer = Tokenizer.load(path)
    except FileNotFoundError:
        raise
    except Exception as e:  # a damaged file can raise nearly anything
        raise InputError(f"{path}: no whole checkpoint ({printable(str(e))[:99]}); there may be an"
                         " earlier one, *.prev.npz") from None
    return jax.tree.unflatten(jax.tree.structure(state), found), about, cfg, tokenizer

# What may be given anew on --resume (eval is a flag of sft.py).
MAY_CHANGE = {"max_steps", "minutes", "eval_every", "log_every", "data_dir", "out_dir", "resume",
              "shard_params", "coordinator", "num_processes", "process_id", "eval"}

def inherit(cfg, given, about, path):
    """cfg with the settings that the checkpoint at path decides:

        --init     those of the model
        --resume   all, except out_dir (the folder may have moved) and what is typed of MAY_CHANGE

    given: the names of the flags that are typed. It is an error if one contradicts the checkpoint.
    """
    saved = about["config"]
    decided = MODEL_SETTINGS
    if cfg.resume:
        decided = saved.keys() - {"out_dir"} - (MAY_CHANGE & given)
    for name in decided & given:
        if saved[name] != getattr(cfg, name):
            raise InputError(f"--{name} {getattr(cfg, name)}: {path} was begun with {saved[name]};"
                             " leave it out or start afresh")
    return replace(cfg, **{name: saved[name] for name in decided})

# ---------------------------------------------------------------- training loop
def train(cfg, state, about, objective, batch_at, validate, path):
    """Train from about["step"] to cfg.max_steps -> state. Pretraining, fine-tuning and DPO differ
    in objective(params, batch, key), batch_at(number), a micro-batch, and validate(params) ->
    (loss, bits a byte). Everything random is a function of (seed, step)."""
    if not cfg.resume:
        state = new_state(state["params"])
        about.update(step=0, seconds=0.0, log=[], best=[0, None, None])
    done = about["step"]
    if done >= cfg.max_steps and not cfg.minutes:
        say(f"{path} is finished, with {done} steps; a larger --max_steps or --minutes goes on")
        return state
    if cfg.minutes:
        cfg = replace(cfg, max_steps=done + 100)  # until its pace is known
    ticks = [time.perf_counter()]  # when it began, and when each step ended
    since = ticks[0] - about["seconds"]  # as if all runs had been one
    placed = placements_of(state, cfg)
    step = make_step(objective, batch_at, cfg, placed)
    state = jax.tree.map(put, state, placed)

    lock = only_writer(path.parent) if writes() else nullcontext()
    with lock, wishes_to_stop() as wishes:
        begin_files(cfg, path, state, about)
        last = False
        while not last:
            rate = learning_rate(done, cfg)
            state, train_loss = step(state, done, rate)
            train_loss = float(train_loss)  # waits for the device
            done += 1
            ticks.append(time.perf_counter())
            about.update(step=done, seconds=ticks[-1] - since)
            if cfg.minutes and len(ticks) > 3:
                cfg = steps_in_time(cfg, done, ticks)  # the rate and the end depend on it

            stopped = in_all_processes(bool(wishes)).any()  # all processes after the same step
            finished = done >= cfg.max_steps
            last = finished or stopped or not math.isfinite(train_loss)  # NaN: save() fails
            due = cfg.eval_every and (finished or done % cfg.eval_every == 0)
            nats, bits = validate(state["params"]) if due else (None, None)
            if last or due or done == 1 or done % cfg.log_every == 0:
                speed = speed_of(ticks, cfg)
                row = Row(done, train_loss, nats, bits, rate, speed, about["seconds"])
                about["log"].append(row)
                write_row(cfg, about, path, stays=last or due)
            if last or due:
                best = lower(about["best"], [done, nats, bits])
                saved = save(cfg, path, state, about, best, must_succeed=last)
    conclude(cfg, about, path)
    if not finished:
        sys.exit(130)  # interrupted
    return saved

# ---------------------------------------------------------------- what train() calls, in turn
def begin_files(cfg, path, state, about):
    """Save at once, so that a full disk is noticed now, and write the log so far. What the run
    before left is kept as *.prev.*"""
    best_path = path.with_suffix(".best.npz")
    if writes() and not cfg.resume:
        for left in (path, best_path, log_of(path)):
            keep_previous(left)
        best_path.unlink(missing_ok=True)
    save(cfg, path, state, about, about["best"], must_succeed=True)
    if writes():
        check_room(path)
    add_rows(path, "w", [Row._fields, *about["log"]])

def check_room(path):
    """Fail now if the disk has no room for two more checkpoints: the best one and the next one."""
    if shutil.disk_usage(path.parent).free < 2 * path.stat().st_size:
        raise InputError(f"{path}: the disk has no room for two more of it")

def log_of(path):
    """out/base.npz -> out/log.csv, out/chat.npz -> out/log_chat.csv"""
    return path.with_name("log.csv" if path.stem == "base" else f"log_{path.stem}.csv")

def add_rows(path, mode, rows):
    """Add rows ("a") to the log of a checkpoint or begin it anew with them ("w")."""
    with open(log_of(path) if writes() else os.devnull, mode) as file:
        csv.writer(file, lineterminator="\n").writerows(rows)  # None as nothing

def steps_in_time(cfg, done, ticks):
    """cfg with as many steps as --minutes have room for at the pace so far. It is called after each
    step but the first two. ticks: when the run was started and when each step ended, in seconds.
    Here a step takes one second and 10 seconds are left, so there will be 10 more:

    >>> steps_in_time(Config(minutes=1), 4, [-46, 1, 2, 3, 4]).max_steps
    14
    """
    began, first, *_, now = ticks
    timed = len(ticks) - 2  # steps, but not the first, in which all was compiled
    pace = max(1e-9, (now - first) / timed)  # seconds a step
    left = began + 60 * cfg.minutes - now
    steps = done + max(0, int(left / pace))
    steps = int(in_all_processes(steps).min())  # all processes end together
    if timed == 20:  # the first steps of a process are slow
        show_progress(f"--minutes {cfg.minutes:g}: enough for about {steps} steps", last=True)
    return replace(cfg, max_steps=steps)

def speed_of(ticks, cfg):
    """Tokens a second, as the last steps tell; at least 1, for write_row() divides by it."""
    last = ticks[-cfg.log_every - 1:]
    seconds = max(1e-9, np.median(np.diff(last)))
    return max(1, round(tokens_a_step(cfg) / seconds))

def write_row(cfg, about, path, stays):
    """The last row of the log onto the screen, and into the file if that is possible."""
    row = about["log"][-1]
    with suppress(OSError):
        add_rows(path, "a", [row])
    left = clock((cfg.max_steps - row.step) * tokens_a_step(cfg) / row.tokens_per_second)
    validation = f"validation {row.val_loss:.3f}  " if row.val_loss else ""
    show_progress(f"step {row.step}/{cfg.max_steps}  loss {row.train_loss:.3f}  {validation}"
                  f"{row.tokens_per_second} tokens/s  {left} left", last=stays)

def lower(best, new):
    """Of two [step, nats, bits a byte] the one with the lower loss, if there is one."""
    return min(best, new, key=lambda validation: validation[1] or math.inf)

def save(cfg, path, state, about, best, must_succeed=False):
    """Save a checkpoint -> the state, collected from all devices and processes. best: the lowest
    validation so far, with this one; about["best"] is that of the file on the disk. If they differ
    this checkpoint is the new best, so it is saved as *.best.npz, too. A failure is an error if the
    save must succeed, else one line tells of it."""
    about["config"] = asdict(replace(cfg, minutes=0.0))  # the minutes have become max_steps
    state = process_allgather(state, tiled=True)
    try:
        if writes():
            if best != about["best"]:
                # Before the other: if it is killed in between, --resume makes the best once more.
                save_checkpoint(path.with_suffix(".best.npz"), state, about | {"best": best})
            save_checkpoint(path, state, about | {"best": best})
        about["best"] = best  # only now is it on the disk
    except OSError as e:
        if must_succeed:
            raise
        say(f"{path}: not saved ({e.strerror}); the next validation tries again")
    return state

def conclude(cfg, about, path):
    """Tell what a run was started with and its lowest validation; both stay in runs.jsonl."""
    usual = asdict(type(cfg)())
    settings = {name: value for name, value in asdict(cfg).items() if value != usual[name]}
    step, nats, bits = about["best"]
    result = {"checkpoint": path.name, "steps": about["step"], "settings": settings,
              "best_step": step, "val_loss": nats, "val_bits_per_byte": bits}
    runs = path.with_name("runs.jsonl")
    with suppress(OSError), open(runs if writes() else os.devnull, "a") as file:
        print(json.dumps(result), file=file)
    say(f"settings, also in {runs}: {settings}")
    if step:
        bits = f" ({bits:.3f} bits a byte)" if bits else ""
        say(f"lowest validation {nats:.3f}{bits} at step {step}, kept as"
            f" {path.with_suffix('.best.npz')}{of_run_before(path)}")
    if about["step"] < cfg.max_steps:
        say(f"interrupted at step {about['step']}, saved in {path}; go on with: python"
            f" {SCRIPTS[path.stem]} --resume --out_dir {cfg.out_dir}")
    else:
        _, losses, *_ = zip(*about["log"])
        draw(losses)

def of_run_before(path):
    """What conclude() adds if the run before was validated: "; of the run before 1.621 (...)"."""
    log_path = log_of(path).with_suffix(".prev.csv")
    with suppress(OSError, ValueError, KeyError), open(log_path) as file:
        losses = [row["val_loss"] for row in csv.DictReader(file)]
        return f"; of the run before {min(map(float, filter(None, losses))):.3f} ({log_path})"
    return ""

# ---------------------------------------------------------------- hosts and processors: skip it
def in_all_processes(value):
    """[value]; with several processes, as on several hosts (see join), the value of each."""
    return process_allgather(np.array(value))

def fast_dtype():
    """bfloat16 if the CPUs of all processes multiply it natively, as Linux tells, else float32."""
    cpu = Path("/proc/cpuinfo")
    native = cpu.exists() and "avx512_bf16" in cpu.read_text() and device().platform == "cpu"
    new_enough = jax.__version_info__ >= (0, 10)  # older ones are no faster with it
    return "bfloat16" if in_all_processes(native and new_enough).all() else "float32"

def writes():
    """Whether this process prints and writes: on several hosts only the first one does."""
    return jax.process_index() == 0

def join(cfg):
    """Become one of several processes, through JAX's own runtime. On SLURM and Cloud TPU it knows
    all it needs. Process 0 alone prints and writes; all must see the same data_dir and out_dir."""
    # srun sets both, sbatch the first alone, and then nobody else has been started.
    slurm = os.environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_STEP_NODELIST" in os.environ
    if not (cfg.coordinator or slurm or "TPU_ML_PLATFORM" in os.environ):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = [cfg.coordinator, cfg.num_processes, cfg.process_id] if cfg.coordinator else []
    try:
        jax.distributed.initialize(*where)
    except (ValueError, IndexError) as e:
        raise InputError(f"--coordinator {cfg.coordinator}: HOST:PORT, and --process_id below"
                         f" --num_processes ({e})") from None
    if not writes():
        sys.stdout = open(os.devnull, "w")

def small_gradient(where, dropout):
    """The gradient of a small model, all of whose parameters are random, computed on a device, as
    one array."""
    cfg = Config(n_layer=1, dtype="float32", vocab_size=64, dropout=dropout)
    rng = np.random.default_rng(0)
    params = init_params(cfg)
    params = jax.tree.map(lambda p: p + np.float32(rng.normal(0, 0.1, p.shape)), params)
    batch = rng.integers(64, size=(3, 3, 64))  # x, y and whole numbers as weights
    with jax.default_device(where):
        gradient_of = jax.jit(jax.grad(loss, has_aux=True), static_argnums=3)
        gradient, _ = gradient_of(params, batch, np.uint32([0, 1]), cfg)
        return np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradient)])

def check_device(dropout=0.0):
    """Apple's plug-ins have given wrong numbers without a word (as in jax#21757): before such a GPU
    is trusted, it must agree with the CPU. Otherwise everything runs on the CPU."""
    if not on_metal():
        return
    gpu, cpu = device(), jax.devices("cpu")[0]
    problem = "its gradients are not the CPU's"
    try:
        right = small_gradient(cpu, dropout)
        error = np.abs(small_gradient(gpu, dropout) - right).max()
        if error < 1e-2 * np.abs(right).max():
            return
    except Exception as e:  # whatever a plug-in raises
        problem = printable(" ".join(repr(e).split()))[:99]
    print(f"{gpu} is not used, all runs on the CPU: {problem}", file=sys.stderr)
    jax.config.update("jax_default_device", cpu)

# ---------------------------------------------------------------- main
def make_corpus_if_missing(data_dir):
    """The default text; one process makes it, and the others wait."""
    if not (data_dir / "train.bin").exists():
        say(f"no {data_dir}/train.bin yet: running prepare.py")
        if writes():
            prepare.main([])
    sync_global_devices("corpus")

def check_sizes(cfg):
    if cfg.n_embd % (2 * cfg.n_head):
        raise InputError(f"--n_embd {cfg.n_embd}: no multiple of 2 x n_head = {2 * cfg.n_head}")
    if jax.process_count() > 1 and cfg.batch_size % jax.device_count():
        raise InputError(f"--batch_size: no multiple of the {jax.device_count()} devices")

def show_sample(cfg, params, tokenizer):
    """A new document: it begins after END, which follows each document."""
    rng = np.random.default_rng(cfg.seed)
    steps = make_generator(cfg)(params, [[END]], 2 * cfg.block_size, rng, temperature=0.8)
    say(f"sample: {printable(tokenizer.decode(new for [new], _ in steps))}\n")

def say_what_is_next(cfg, path):
    pairs = "" if Path(cfg.data_dir, "qa.jsonl").exists() else " PAIRS"  # the user's
    folders = ""
    if (cfg.data_dir, cfg.out_dir) != ("data", "out"):
        folders = f" --init {path} --data_dir {cfg.data_dir} --out_dir {cfg.out_dir}"
    say(f"checkpoint: {path}\nnext: python sft.py{pairs}{folders}   (or python chat.py {path})")

def main(argv):
    cfg, given = read_flags(Config, argv, __doc__)
    join(cfg)
    path = Path(cfg.out_dir, "base.npz")
    start = path if cfg.resume else cfg.init
    if start:
        state, about, *_ = load_checkpoint(start, cfg.resume)
        cfg = inherit(cfg, given, about, start)
    data_dir = Path(cfg.data_dir)
    if not start and "data_dir" not in given:
        make_corpus_if_missing(data_dir)
    check_device(cfg.dropout)
    tokenizer = Tokenizer.load(data_dir / "tokenizer.json")
    if start and about["tokenizer"] != tokenizer.to_json():
        raise InputError(f"{data_dir}: another vocabulary than that of {start}; prepare.py"
                         f" --tokenizer {start} makes one with its own")
    if not start:
        dtype = fast_dtype() if cfg.dtype == "auto" else cfg.dtype
        cfg = replace(cfg, vocab_size=tokenizer.size, dtype=dtype)
        state = {"params": init_params(cfg, np.random.default_rng(cfg.seed))}
    check_sizes(cfg)

    ids = load_tokens(data_dir / "train.bin", tokenizer, cfg.block_size + 1)
    validate = make_validation(load_tokens(data_dir / "val.bin", tokenizer, 2), tokenizer, cfg)
    batch_at = partial(random_batch, ids, cfg.batch_size, cfg.block_size, cfg.seed)
    checksum = zlib.crc32(ids)
    if not cfg.resume:  # a new run, also with --init
        about = {"kind": "base", "tokenizer": tokenizer.to_json(), "text": checksum}
    if about.get("text", checksum) != checksum:
        raise InputError(f"{data_dir}: another text than {path} was begun with; --init {path}"
                         " goes on from it with a new one")
    n_params = sum(p.size for p in jax.tree.leaves(state["params"]))
    tokens = tokens_a_step(cfg)
    say(f"{placements(cfg.batch_size)[0].mesh.size} {device().platform} device(s), {cfg.dtype},"
        f" {n_params:,} parameters, {tokens} tokens a step, {len(ids)} tokens an epoch"
        f" ({len(ids) / tokens:.0f} steps), expected first loss ln {cfg.vocab_size} ="
        f" {math.log(cfg.vocab_size):.3f}")
    try:
        state = train(cfg, state, about, partial(loss, cfg=cfg), batch_at, validate, path)
    except (RuntimeError, ValueError) as e:  # either, for a broken connection
        if jax.process_count() == 1:
            raise
        print(f"error: a process is out of reach ({str(e)[:99]!r}); start all with --resume",
              file=sys.stderr, flush=True)
        os._exit(2)  # at once: jax would wait for the others
    show_sample(cfg, state["params"], tokenizer)
    say_what_is_next(cfg, path)

if __name__ == "__main__":
    run(main)
