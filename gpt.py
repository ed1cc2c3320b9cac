"""A GPT in pure JAX: parameters, forward pass, loss, Adam, checkpoints, generation, training loop.

    python gpt.py                          # trains on data/ (the built-in corpus if there is none), writes out/base.npz
    python gpt.py --n_layer 6 --learning_rate 2e-3
    python gpt.py --resume                 # goes on after Ctrl-C or a power cut

The model is written for one sequence; jax.vmap makes the batch, jax.grad the gradient, jax.jit the machine code.
Reading order: settings, parameters, layers, model, loss, optimiser, step, data, generation, checkpoint, loop, main.

    B batch   T time (tokens)   S time of keys and values   C width   H heads   D = C / H   V vocabulary
"""
import contextlib
import csv
import ctypes
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import signal
import sys
import time

program = pathlib.Path(sys.argv[0]).name
if sys.platform == "linux" and program in ("gpt.py", "sft.py", "chat.py") and "GLIBC_TUNABLES" not in os.environ:
    # Each step asks for its memory anew. Linux hands it out in pages of 4 kB, which takes a sixth of a step's time, or
    # of 2 MB if the C library asks for them. It reads that when a program starts, so this one starts once more.
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

import numpy as np

import prepare
from prepare import (CORES, END, InputError, Tokenizer, printable, read_flags, run, setting, show_progress, time_left,
                     whole_file)

os.environ.setdefault("ENABLE_PJRT_COMPATIBILITY", "1")  # Apple's jax-metal needs it, nobody else minds
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # A CPU device for each core: small matrix products run faster on one core each than spread over all of them.
    devices = f" --xla_force_host_platform_device_count={CORES}"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + devices

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

NEW_JAX = jax.__version_info__ >= (0, 10)  # Macs have older versions, which lack some options

# ---------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class Model:
    n_layer: int = setting(4, "transformer blocks", low=1, high=1000)
    n_head: int = setting(4, "attention heads in a block", low=1, high=1000)
    n_embd: int = setting(128, "width: numbers that stand for a token", low=1, high=1 << 16)
    block_size: int = setting(64, "context: tokens the model sees at once", low=1, high=1 << 20)
    dropout: float = setting(0.0, "part of the activations set to 0 in training", high=0.9)
    dtype: str = "float32"  # of products with weights and of attention in long contexts, or "bfloat16"
    vocab_size: int = 0  # the tokenizer's, not a flag


@dataclasses.dataclass(frozen=True)
class Training:
    batch_size: int = setting(16, "sequences in a micro-batch", low=1, high=1 << 20)
    grad_accum: int = setting(1, "micro-batches in a step", low=1, high=1 << 20)
    max_steps: int = setting(2000, "optimiser steps", low=1)
    minutes: float = setting(0.0, "train for about so long: measures the speed, sets max_steps; 0 means off")
    learning_rate: float = setting(4e-3, "at its peak, after warm-up; falls along a cosine to 5 % of it")
    warmup: float = setting(0.05, "steps of linear warm-up; below 1, a part of max_steps")
    weight_decay: float = setting(0.6, "of matrices")
    grad_clip: float = setting(1.0, "largest norm of the whole gradient; 0 means never clip")
    beta1: float = setting(0.9, "Adam's memory of the gradient", high=0.9999)
    beta2: float = setting(0.99, "Adam's memory of the squared gradient", high=0.999999)
    seed: int = setting(0, "of parameters, batches and dropout", high=2**32 - 1)
    eval_every: int = setting(250, "steps between validations; 0 means never")
    eval_tokens: int = setting(1 << 17, "validation tokens looked at, from the first on", low=1)
    log_every: int = setting(10, "steps between rows of log.csv", low=1)
    save_every: int = setting(250, "steps between checkpoints; 0 means only at the end")
    sample_every: int = setting(0, "steps between samples; 0 means only at the end")
    data_dir: str = setting("data", "folder with train.bin, val.bin and tokenizer.json")
    out_dir: str = setting("out", "folder for checkpoints and log.csv")
    resume: bool = setting(False, "go on from the last checkpoint in out_dir")
    shard_params: bool = setting(False, "split parameters and Adam's moments over the devices, not a copy on each")


@dataclasses.dataclass(frozen=True)
class Config(Training, Model):
    dtype: str = setting("auto", "of products with weights, and of attention in contexts beyond 128 tokens; auto:"
                         " bfloat16 on a CPU that is fast at it, else float32",
                         choices=["auto", "float32", "bfloat16"])
    init: str = setting("", "checkpoint to take the parameters from", metavar="CKPT")
    coordinator: str = setting("", "several hosts: address of process 0 (SLURM and Cloud TPU need none)",
                               metavar="HOST:PORT")
    num_processes: int = setting(1, "several hosts: how many processes there are", low=1)
    process_id: int = setting(0, "several hosts: which of them this one is, from 0")


MAY_CHANGE = {"max_steps", "eval_every", "eval_tokens", "log_every", "save_every", "sample_every", "data_dir",
              "out_dir", "resume", "shard_params", "coordinator", "num_processes", "process_id"}


def backend():
    """cpu, gpu, tpu or metal, which is Apple's GPU: its plug-ins lack some operations, and the code does without."""
    name = jax.default_backend().lower()
    return "metal" if name in ("mps", "mtl") else name


def fast_dtype():
    """bfloat16 on a CPU that multiplies it natively, as Linux tells; else float32. Process 0 decides for all."""
    cpu = pathlib.Path("/proc/cpuinfo")
    native = backend() == "cpu" and NEW_JAX and cpu.exists() and "avx512_bf16" in cpu.read_text()
    return "bfloat16" if multihost_utils.broadcast_one_to_all(np.int32(native)) else "float32"


# ---------------------------------------------------------------- parameters


def init_params(model, seed=0):
    """Nested dicts of float32 arrays. Matrices that read the residual stream are normal with deviation 0.5 / sqrt(C),
    those that add to it zero: a block begins as the identity. NumPy's generator: the same with every version of JAX."""
    rng = np.random.default_rng(seed)
    C = model.n_embd

    def normal(*shape, scale=0.5 / math.sqrt(C)):
        return rng.normal(0, scale, shape).astype(np.float32)

    def constant(value, *shape):
        return np.full(shape, value, np.float32)

    blocks = [{
        "norm1": constant(1, C),
        "attn": {"wqkv": normal(C, 3 * C), "wo": constant(0, C, C)},
        "norm2": constant(1, C),
        "mlp": {"w_up": normal(C, 4 * C), "w_down": constant(0, 4 * C, C)},
    } for _ in range(model.n_layer)]
    wte = normal(model.vocab_size, C, scale=0.02)  # small, being the head too: the first loss is then near ln V
    return {"wte": wte, "blocks": blocks, "norm": constant(1, C)}


# ---------------------------------------------------------------- layers


def lookup(table, ids):
    """table (N, C), ids (T,) -> (T, C). Metal has no usable gradient of table[ids]; there a one-hot product."""
    return jax.nn.one_hot(ids, len(table)) @ table if backend() == "metal" else jnp.asarray(table)[ids]


def contract(a, b, axes):
    """A matrix product with sums in float32: axes (1, 0) give a @ b, axes (1, 1) a @ b.T. Also of several axes."""
    return jnp.tensordot(a, b, axes, preferred_element_type=np.float32)


def matmul(x, w, model, axis=0):
    """x (T, M) times a weight matrix w (M, N), or with axis 1 (N, M), in the model's dtype, the result in float32."""
    return contract(x, w, (1, axis)) if model.dtype == "float32" else rounded_matmul(x, w, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rounded_matmul(x, w, axis):
    """In bfloat16. With a backward pass of its own: jax.grad would multiply bfloat16 by float32, much slower."""
    return rounded_matmul_forward(x, w, axis)[0]


def rounded_matmul_forward(x, w, axis):
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return contract(x, w, (1, axis)), (x, w)


def rounded_matmul_backward(axis, saved, dy):
    x, w = saved
    dy = dy.astype(jnp.bfloat16)
    dw = weight_gradient(x, dy) if axis == 0 else weight_gradient(dy, x)
    return contract(dy, w, (1, 1 - axis)), dw


rounded_matmul.defvjp(rounded_matmul_forward, rounded_matmul_backward)


@jax.custom_batching.custom_vmap
def weight_gradient(a, b):
    """Of one sequence: a (T, M), b (T, N) -> (M, N)."""
    return contract(a, b, (0, 0))


@weight_gradient.def_vmap
def _(size, batched, a, b):  # of a batch as one product: vmap would make B products, and add them
    return contract(a, b, ((0, 1), (0, 1))), False  # False: the sum has no batch axis, as w has none


def norm(x, gain):
    """Root mean square normalisation (arXiv 1910.07467): (T, C) -> (T, C)."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain[None]


def rotation(model):
    """Cosines and sines (T, D/2) of the rotary positions (arXiv 2104.09864); constants, made in NumPy."""
    half = model.n_embd // model.n_head // 2
    angle = np.arange(model.block_size)[:, None] * 10000.0 ** (-np.arange(half) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x, cos, sin):
    """Turn each pair of numbers by its position's angle: x (H, T, D), cos and sin (T, D/2)."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[None], sin[None]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def drop(x, model, key):
    """Dropout with an explicit key; without one, as in evaluation, nothing is dropped."""
    if key is None or model.dropout == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - model.dropout, x.shape)
    return jnp.where(keep, x / (1 - model.dropout), 0)


def head(q, k, v, allowed):
    """One attention head (arXiv 1706.03762, eq. 1): q (T, D), divided by sqrt(D) already, k and v (S, D), allowed
    (T, S) -> (T, D), and the logarithms of the softmax's denominators (T,)."""
    scores = jnp.where(allowed, contract(q, k, (1, 1)), -1e9)  # finite: -inf gives NaN on Metal
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    y = contract(weights.astype(v.dtype), v, (1, 0)) / total  # divided last: D numbers, not S
    return y, (top + jnp.log(total))[:, 0]


QUERIES = 128  # in a block; a context of more than one block counts as long


def parts(T):
    """Blocks of queries -> (start, end, mask); each sees the keys up to its own end only: up to half the work saved."""
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        yield start, end, np.tri(end - start, end, start, dtype=bool)


def over_heads(f, *arrays):
    """f for all heads at once; on a CPU, if the context is long, one by one: a head's scores then fit its caches."""
    if backend() == "cpu" and arrays[0].shape[1] > QUERIES:
        return jax.lax.map(lambda one: f(*one), arrays)
    return jax.vmap(f)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def causal_heads(q, k, v, dtype):
    """All heads over a whole sequence, products in dtype: q, k, v (H, T, D) -> (H, T, D). The backward pass, written by
    hand, computes the weights again instead of keeping T x T of them (arXiv 2205.14135)."""
    return causal_heads_forward(q, k, v, dtype)[0]


def causal_heads_forward(q, k, v, dtype):
    q, k, v = (z.astype(dtype) for z in (q, k, v))
    y, logs = over_heads(causal_head, q, k, v)
    return y, (q, k, v, y, logs)


def causal_heads_backward(dtype, saved, dy):
    return over_heads(causal_head_gradients, *saved, dy)


causal_heads.defvjp(causal_heads_forward, causal_heads_backward)


def causal_head(q, k, v):
    """One head, block by block: q, k, v (T, D) -> what head gives."""
    y, logs = zip(*(head(q[start:end], k[:end], v[:end], allowed) for start, end, allowed in parts(len(q))))
    return jnp.concatenate(y), jnp.concatenate(logs)


def causal_head_gradients(q, k, v, y, logs, dy):
    """All (T, D), logs (T,) -> dq, dk, dv. With P = softmax(scores), a row for each query: dV = P^T dY, dP = dY V^T,
    dscores = P (dP - sum(dP P)), where the sum is that of dY Y; dQ = dscores K, dK = dscores^T Q. Here all is
    transposed, a row for each key, and no product has its left side turned: an order that suits a CPU."""
    sums, dq, dk, dv = (dy * y).sum(-1), [], [], []
    dy = dy.astype(q.dtype)
    for start, end, allowed in parts(len(q)):
        scores = jnp.where(allowed.T, contract(k[:end], q[start:end], (1, 1)), -1e9)
        weights = jnp.exp(scores - logs[start:end][None])
        dscores = weights * (contract(v[:end], dy[start:end], (1, 1)) - sums[start:end][None])
        weights, dscores = weights.astype(q.dtype), dscores.astype(q.dtype)
        dq.append(contract(k.T[:, :end], dscores, (1, 0)))
        dk.append(contract(dscores, q[start:end], (1, 0)))
        dv.append(contract(weights, dy[start:end], (1, 0)))

    def add_up(shares):  # a block of keys has a share from its own queries and from all later ones
        return jnp.concatenate([sum(s[start:end] for s in shares if end <= len(s)) for start, end, _ in parts(len(q))])

    return jnp.concatenate(dq, axis=1).T, add_up(dk), add_up(dv)


def cudnn_can(model):
    """Whether cuDNN's fused attention fits: an NVIDIA GPU, bfloat16, heads of a size that it knows."""
    size = model.n_embd // model.n_head
    return "NVIDIA" in jax.devices()[0].device_kind and model.dtype == "bfloat16" and size <= 128 and size % 8 == 0


def heads_by_cudnn(q, k, v):
    q, k, v = (z.transpose(1, 0, 2).astype(jnp.bfloat16) for z in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=1.0, implementation="cudnn")
    return y.transpose(1, 0, 2).astype(np.float32)


def attention(x, wqkv, wo, where, cache, model):
    """(T, C) -> (T, C), and the keys and values (H, S, D) that later tokens will look at."""
    T, C = x.shape
    q, k, v = jnp.split(matmul(x, wqkv, model), 3, axis=-1)
    q, k, v = (z.reshape(T, model.n_head, -1).transpose(1, 0, 2) for z in (q, k, v))  # each (H, T, D)
    q, k = rotate(q, where["cos"], where["sin"]), rotate(k, where["cos"], where["sin"])
    q = q / np.float32(math.sqrt(q.shape[-1]))
    if cache is not None:  # one new token: put its key and value in their place among the old ones
        k, v = (jnp.where(where["here"], new, old) for new, old in zip((k, v), cache))
        y, _ = jax.vmap(head, (0, 0, 0, None))(q, k, v, where["allowed"])
    else:
        dtype = model.dtype if T > QUERIES else "float32"  # in shorter contexts rounding saves no time
        y = heads_by_cudnn(q, k, v) if cudnn_can(model) else causal_heads(q, k, v, dtype)
    return matmul(y.transpose(1, 0, 2).reshape(T, C), wo, model), (k, v)


def feed_forward(x, w_up, w_down, model):
    """Two matrices with a squared ReLU between them (arXiv 2109.08668): (T, C) -> (T, 4C) -> (T, C)."""
    return matmul(jnp.square(jax.nn.relu(matmul(x, w_up, model))), w_down, model)


def block(x, norm1, attn, norm2, mlp, where, cache, model, keys):
    """One transformer block, normalised before each part: (T, C) -> (T, C) and its keys and values."""
    y, cache = attention(norm(x, norm1), **attn, where=where, cache=cache, model=model)
    x = x + drop(y, model, keys[0])
    return x + drop(feed_forward(norm(x, norm2), **mlp, model=model), model, keys[1]), cache


# ---------------------------------------------------------------- model


def forward(params, tokens, model, key=None, at=None, cache=None):
    """One sequence: tokens (T,) -> logits (T, V) for the token after each, and every block's keys and values.

    Training needs no more. Generation asks for one position only: the logits after tokens[at] (1, V) when it fills the
    cache, and with `cache` given, the logits after the one token (1,) that now stands at position `at`.
    """
    cos, sin = rotation(model)
    if cache is None:
        where = dict(cos=cos[:len(tokens)], sin=sin[:len(tokens)])
        cache = [None] * model.n_layer
    else:
        S = np.arange(model.block_size)
        where = dict(cos=lookup(cos, at[None]), sin=lookup(sin, at[None]), here=(S == at)[None, :, None],
                     allowed=(S <= at)[None])
    keys = [None] * (2 * model.n_layer + 1) if key is None else jax.random.split(key, 2 * model.n_layer + 1)
    x = drop(lookup(params["wte"], tokens), model, keys[-1])
    new_cache = []
    for i, parameters in enumerate(params["blocks"]):
        x, kv = block(x, **parameters, where=where, cache=cache[i], model=model, keys=keys[2 * i:])
        new_cache.append(kv)
    if at is not None and cache[0] is None:
        x = lookup(x, at[None])
    return matmul(norm(x, params["norm"]), params["wte"], model, axis=1), new_cache  # the head is the embedding


# ---------------------------------------------------------------- loss


def token_losses(params, x, y, key, model):
    """Cross-entropy in nats of each token: x, y (T,) -> (T,)."""
    logits, _ = forward(params, x, model, key)
    picked = (logits * jax.nn.one_hot(y, logits.shape[-1])).sum(-1)  # not a gather: its gradient fails on Metal
    top = jax.lax.stop_gradient(logits.max(-1))
    return jnp.log(jnp.exp(logits - top[:, None]).sum(-1)) + top - picked


def loss(params, batch, key, model):
    """Weighted sum of the tokens' losses, and the sum of the weights. batch: x, y (B, T) int32, w (B, T) float32.

    Sums, not a mean: micro-batches and devices with unequal weights add up to the right gradient."""
    x, y, w = batch
    keys = jax.random.split(key, len(x)) if model.dropout else None
    losses = jax.vmap(functools.partial(token_losses, model=model), (None, 0, 0, 0))(params, x, y, keys)
    return (losses * w).sum(), w.sum()


# ---------------------------------------------------------------- optimiser


def learning_rate(step, cfg):
    """Step (from 0) -> linear warm-up, then a cosine from the peak to 5 % of it at max_steps."""
    warmup = cfg.warmup if cfg.warmup >= 1 else cfg.warmup * cfg.max_steps
    if step < warmup:
        return cfg.learning_rate * (step + 1) / (warmup + 1)
    part = min(1.0, (step - warmup) / max(1.0, cfg.max_steps - warmup))
    return cfg.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * part)))


def rates(step, cfg):
    """What Adam needs of the step (from 0), computed on the host: learning rate and the two bias corrections."""
    return np.array([learning_rate(step, cfg), 1 - cfg.beta1 ** (step + 1), 1 - cfg.beta2 ** (step + 1)], np.float32)


def new_state(params):
    """Parameters and Adam's two moments, alike nested dicts."""
    return dict(params=params, m=jax.tree.map(np.zeros_like, params), v=jax.tree.map(np.zeros_like, params))


def adam(state, grads, rates, cfg):
    """One step of Adam (arXiv 1412.6980) with decoupled weight decay of matrices (arXiv 1711.05101) and the gradient
    clipped to a global norm."""
    lr, correct1, correct2 = rates
    length = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(grads)))
    scale = jnp.minimum(1.0, cfg.grad_clip / (length + 1e-6)) if cfg.grad_clip else 1.0

    def update(p, m, v, g):
        g = g * scale
        m = m + (1 - cfg.beta1) * (g - m)
        v = v + (1 - cfg.beta2) * (g * g - v)
        decay = cfg.weight_decay * p if p.ndim > 1 else 0
        return p - lr * (m / correct1 / (jnp.sqrt(v / correct2) + 1e-8) + decay), m, v

    # a tree of triples -> a triple of trees
    updated = jax.tree.map(update, state["params"], state["m"], state["v"], grads)
    return dict(zip(("params", "m", "v"), jax.tree.transpose(jax.tree.structure(grads), None, updated)))


# ---------------------------------------------------------------- step


def placements(batch_size, devices=None):
    """Where arrays live: (one copy on each device, split over the devices along the first axis). As many devices as
    divide the batch; jit sees the placement and adds what the devices must tell each other."""
    devices = devices or jax.devices()
    n = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    mesh = Mesh(np.array(devices[:n]), ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def homes(state, cfg):
    """Where each array of the state lives between steps: whole on every device, or with --shard_params split along the
    first axis that the devices divide (ZeRO, arXiv 1910.02054)."""
    mesh = placements(cfg.batch_size)[0].mesh

    def home(a):
        axes = [i for i, size in enumerate(a.shape) if cfg.shard_params and size % mesh.size == 0]
        return NamedSharding(mesh, PartitionSpec(*[None] * axes[0], "data") if axes else PartitionSpec())

    return jax.tree.map(home, state)


def put(array, placement):
    """An array onto the devices; where other processes hold some of them, each process fills its own."""
    return jax.make_array_from_callback(np.shape(array), placement, lambda part: np.asarray(array)[part])


def give_back(event, seconds, **_):
    """JAX calls this after each of its tasks. After a long compilation the memory that the compiler has freed, some
    150 MB, goes back to the system, if the C library can do that."""
    if event.endswith("backend_compile_duration") and seconds > 1:
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)


jax.monitoring.register_event_duration_secs_listener(give_back)


def make_step(objective, cfg, model):
    """objective(params, batch, key) -> (sum, count) becomes step(state, [(batch, key), ...], rates) -> (state, loss):
    sums and counts of the micro-batches are added up and divided once, so their sizes do not matter."""

    def place(tree, placement):
        return jax.lax.with_sharding_constraint(tree, placement) if cfg.shard_params else tree

    def add(sums, params, batch, key):
        params = place(params, placements(cfg.batch_size)[0])  # gathered for the two passes
        (total, count), grads = jax.value_and_grad(objective, has_aux=True)(params, batch, key)
        new = place(grads, homes(grads, cfg)), total, count
        return jax.tree.map(jnp.add, sums, new) if sums else new

    def update(state, sums, rates):
        grads, total, count = sums
        count = jnp.maximum(count, 1)
        state = adam(state, jax.tree.map(lambda g: g / count, grads), rates, cfg)
        return place(state, homes(state, cfg)), total / count

    # XLA would start all parts of attention at once; one after the other they need less memory and time.
    in_order = NEW_JAX and backend() == "cpu" and model.block_size > QUERIES
    scheduler = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    add = jax.jit(add, compiler_options=scheduler if in_order else None)
    update = jax.jit(update, donate_argnums=() if backend() == "metal" else 0)

    def step(state, batches, rates):
        sums = None
        for batch, key in batches:  # one at a time: two in flight on virtual CPU devices can block each other
            sums = jax.block_until_ready(add(sums, state["params"], batch, key))
        return update(state, sums, rates)

    return step


# ---------------------------------------------------------------- data


def load_tokens(path, tokenizer, at_least):
    """Memory-mapped ids of train.bin or val.bin, checked."""
    size = path.stat().st_size
    if size % 2:
        raise InputError(f"{path}: damaged (odd length); run prepare.py again")
    if size < 2 * at_least:
        raise InputError(f"{path}: {size // 2} tokens, {at_least} needed; use more text or a smaller --block_size")
    ids = np.memmap(path, "<u2", "r")
    if ids.max() >= tokenizer.size:
        raise InputError(f"{path}: ids beyond the vocabulary of {tokenizer.size}; run prepare.py again")
    return ids


def random_batch(ids, n, T, seed, number):
    """The number-th batch of a run: n rows of T + 1 tokens, a function of (seed, number) alone, so that a resumed run
    sees what an uninterrupted one would have seen. A row begins where a document does, if one begins nearby."""
    batch = np.empty((n, T + 1), np.int32)
    for row, start in enumerate(np.random.default_rng([seed, number]).integers(0, len(ids) - T, n)):
        ends = np.flatnonzero(ids[start:start + T] == END)
        if len(ends) and start + ends[0] + T + 2 <= len(ids):
            start += ends[0] + 1
        batch[row] = ids[start:start + T + 1]
    return batch[:, :-1], batch[:, 1:], np.ones((n, T), np.float32)


def make_validation(ids, tokenizer, model, cfg):
    """-> a function of the parameters: (nats a token, bits a byte) over the first eval_tokens of ids."""
    T, n, placed = model.block_size, 4 * cfg.batch_size, placements(cfg.batch_size)[1]
    ids = np.array(ids[:cfg.eval_tokens + 1], np.int32)
    tokens, size = len(ids) - 1, sum(len(tokenizer.bytes[i]) for i in ids[1:])
    x, y, w = np.zeros((3, -(-tokens // (n * T)) * n * T), np.int32)  # whole batches; the padding has weight 0
    x[:tokens], y[:tokens], w[:tokens] = ids[:-1], ids[1:], 1
    batches = list(zip(*(a.reshape(-1, n, T) for a in (x, y, w.astype(np.float32)))))
    total = jax.jit(lambda params, batch: loss(params, batch, None, dataclasses.replace(model, dropout=0.0))[0])

    def validate(params):
        nats = sum(float(total(params, [put(a, placed) for a in batch])) for batch in batches)
        return nats / tokens, nats / math.log(2) / max(1, size)

    return validate


# ---------------------------------------------------------------- generation


def sample(logits, history, rng, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """Logits (V,) of the next token -> an id. Temperature 0 takes the likeliest; top_k keeps the k likeliest, top_p
    the fewest that together have probability p (arXiv 1904.09751); the penalty lowers tokens already in `history`
    (arXiv 1909.05858)."""
    logits = np.array(logits, np.float64)
    if repetition_penalty != 1 and len(history):
        seen = np.unique(history)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition_penalty, logits[seen] * repetition_penalty)
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    p = np.exp((logits[order] - logits[order[0]]) / temperature)
    p /= p.sum()
    keep = np.cumsum(p) - p <= top_p * (1 - 1e-9)  # the likeliest always stays
    return int(rng.choice(order[keep], p=p[keep] / p[keep].sum()))


def make_generator(model):
    """-> generate(params, prompts, choose, max_new_tokens), compiled once for any length of prompt.

    prompts: lists of ids; choose(row, logits (V,), ids in the context) -> id. Yields after each step the list of new
    ids, None for a row that has said END. A row that fills the context goes on from its last half.
    """
    model, T = dataclasses.replace(model, dropout=0.0), model.block_size
    exact = dataclasses.replace(model, dtype="float32")  # to round the weights for one token takes longer than it saves
    prefill = jax.jit(jax.vmap(lambda p, tokens, at: forward(p, tokens, model, at=at), (None, 0, 0)))
    advance = jax.jit(jax.vmap(lambda p, token, at, cache: forward(p, token[None], exact, at=at, cache=cache),
                               (None, 0, 0, 0)))

    def generate(params, prompts, choose, max_new_tokens):
        contexts, alive, cache = [list(p[-T:]) for p in prompts], [True] * len(prompts), None
        whole, placed = placements(len(contexts), jax.local_devices())
        params = jax.device_put(params, whole)
        for _ in range(max_new_tokens):
            if any(len(r) > T for r in contexts):
                contexts, cache = [r if len(r) <= T else r[-(T // 2 + 1):] for r in contexts], None
            at = put(np.array([len(r) - 1 for r in contexts], np.int32), placed)
            if cache is None:
                tokens = np.array([r + [END] * (T - len(r)) for r in contexts], np.int32)
                logits, cache = prefill(params, put(tokens, placed), at)
            else:
                tokens = np.array([r[-1] for r in contexts], np.int32)
                logits, cache = advance(params, put(tokens, placed), at, cache)
            new = [choose(i, row[0], contexts[i]) if alive[i] else None for i, row in enumerate(np.asarray(logits))]
            alive = [id not in (None, END) for id in new]
            contexts = [r + [id] if goes_on else r for r, id, goes_on in zip(contexts, new, alive)]
            yield new
            if not any(alive):
                return

    return generate


# ---------------------------------------------------------------- checkpoint


def named_leaves(tree):
    """Nested dicts and lists -> {"params.blocks.0.attn.wqkv": array, ...}, and how to put them together again."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    name = lambda path: ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
    return {name(path): leaf for path, leaf in leaves}, structure


def save_checkpoint(path, state, about):
    """One file with everything: parameters, Adam's moments, and `about` (configuration, tokenizer, step) as JSON."""
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(state)[0].items()}
    if not all(np.isfinite(a).all() for a in arrays.values()):
        raise InputError(f"{path}: not written, the parameters are no longer finite; try a smaller --learning_rate")
    with whole_file(path) as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)


def load_checkpoint(path):
    """-> (state, about, Model, Tokenizer), all of it checked; InputError says what is wrong with the file."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        model, tokenizer = Model(**about["model"]), Tokenizer.from_json(about["tokenizer"], path)
        leaves, structure = named_leaves(new_state(init_params(model)))
        for name, leaf in leaves.items():
            found = arrays[name]
            if found.shape != leaf.shape or found.dtype != leaf.dtype or not np.isfinite(found).all():
                raise InputError(f"{path}: damaged, {name} is not a finite {leaf.dtype} array of shape {leaf.shape}")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as e:  # a damaged file can raise nearly anything
        raise InputError(f"{path}: not a whole checkpoint ({type(e).__name__}: {printable(str(e))[:80]});"
                         " take an earlier one, such as *.prev.npz") from None
    if backend() == "metal":
        model = dataclasses.replace(model, dtype="float32")
    return jax.tree_util.tree_unflatten(structure, [arrays[name] for name in leaves]), about, model, tokenizer


def make_if_missing(path, script, flags=()):
    """Run the main of the script that makes a default input, unless it is there and finished."""
    about = load_checkpoint(path)[1] if path.exists() else None
    if about is None or about["step"] < about["config"]["max_steps"]:
        name = pathlib.Path(script.__code__.co_filename).name
        print(f"{path} is unfinished: going on with {name}" if about else f"no {path} yet: running {name}")
        script([*flags, *["--resume"] * bool(about)])


def resume_config(cfg, given, saved, path):
    """The settings that a checkpoint was made with, with the flags given if they may change; others are refused."""
    for name in given & saved.keys() - MAY_CHANGE:
        if saved[name] != getattr(cfg, name):
            raise InputError(f"--{name} {getattr(cfg, name)}: {path} was begun with {saved[name]};"
                             " leave it out or start afresh")
    return dataclasses.replace(cfg, **{k: v for k, v in saved.items() if k not in given | {"resume", "out_dir"}})


# ---------------------------------------------------------------- loop


def begin_log(path, step):
    """Make log.csv ready to be written on from `step`: rows beyond it, of a run that was cut off, go."""
    lines = path.read_text(errors="replace").splitlines() if step and path.exists() else []
    whole = [line for line in lines if re.match(r"\d+(,[^,]*){6}$", line) and int(line.split(",")[0]) <= step]
    with whole_file(path) as file:
        header = "step,train_loss,val_loss,val_bits_per_byte,learning_rate,tokens_per_second,seconds"
        file.write("".join(f"{line}\n" for line in [header, *whole]).encode())


def sum_up(log_path, width=64, height=8):
    """The run's losses as a small plot in plain characters -> how many validations ago the lowest was."""
    with open(log_path, newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train_loss"]) for row in rows]
    if not losses:
        return 0
    means = [np.mean(part) for part in np.array_split(losses, min(width, len(losses)))]
    low, high = min(means), max(means)
    level = [round((m - low) / max(high - low, 1e-9) * (height - 1)) for m in means]
    for h in reversed(range(height)):
        label = {height - 1: f"{high:.2f}", 0: f"{low:.2f}"}.get(h, "")
        print(f"{label:>7} |" + "".join("*" if l == h else " " for l in level).rstrip())
    seen = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    return len(seen) - 1 - int(np.argmin(seen)) if seen else 0


def keep_previous(*paths):
    """Before a fresh run: a.npz -> a.prev.npz."""
    for path in paths:
        if path.exists():
            kept = path.with_name(f"{path.stem}.prev{path.suffix}")
            os.replace(path, kept)
            print(f"the {path.name} of the run before is now {kept}")


def steps_in(cfg, state, step, batches, validate):
    """How many steps fit in cfg.minutes: the median of 20 after compiling, and the validations between them."""
    times = [time.time()]
    for _ in range(22):
        state, value = step(state, batches, rates(0, cfg))
        float(value)
        times.append(time.time())
    seconds = np.median(np.diff(times)[2:])
    if validate and cfg.eval_every:
        for _ in range(2):  # the first also compiles
            begun = time.time()
            validate(state["params"])
        seconds += (time.time() - begun) / cfg.eval_every
    steps = max(1, int((60 * cfg.minutes - (time.time() - times[0])) / seconds))
    steps = int(multihost_utils.broadcast_one_to_all(np.int32(steps)))  # process 0 decides
    print(f"{1000 * seconds:.0f} ms a step: {steps} steps in {cfg.minutes:g} minutes")
    return steps


def train(cfg, state, about, objective, batch_at, validate, path, log_path, show_sample):
    """Train from about["step"] to cfg.max_steps -> state. Everything random is a function of (seed, step).

    batch_at(number) gives a micro-batch, validate(params) the losses to log, show_sample(params) prints a text."""
    whole, split = placements(cfg.batch_size)
    writes, several, model = jax.process_index() == 0, jax.process_count() > 1, Model(**about["model"])
    step, done, best = make_step(objective, cfg, model), about["step"], path.with_name("best.npz")
    count = sum(p.size for p in jax.tree.leaves(state["params"]))
    flops = 6 * count + 12 * model.n_layer * model.n_embd * model.block_size  # a token (arXiv 2204.02311, appendix B)
    gather = jax.jit(lambda a: a, out_shardings=whole)

    def fetch(tree):
        return jax.tree.map(lambda a: np.asarray(a if a.is_fully_replicated else gather(a)), tree)

    def batches_of(step):
        numbers = range(step * cfg.grad_accum, (step + 1) * cfg.grad_accum)
        return [([put(a, split) for a in batch_at(n)], np.array([cfg.seed, n], np.uint32)) for n in numbers]

    def save(path):
        about.update(config=dataclasses.asdict(cfg), step=done, seconds=time.time() - began)
        whole_state = fetch(state)
        if writes:
            save_checkpoint(path, whole_state, about)

    path.parent.mkdir(parents=True, exist_ok=True)
    batches, began, home = batches_of(done), time.time() - about["seconds"], homes(state, cfg)
    if cfg.minutes and not cfg.resume:
        used_up = jax.tree.map(put, state, home)  # a step destroys the state that it is given
        cfg = dataclasses.replace(cfg, max_steps=steps_in(cfg, used_up, step, batches, validate))
    state = jax.tree.map(put, state, home)
    if not cfg.resume:
        save(begun := path.with_name("begun.npz"))  # a folder that cannot be written fails now, nothing touched
    if writes:
        if not cfg.resume:
            keep_previous(path, log_path, *[best] * (about["kind"] == "base"))
            os.replace(begun, path)
        begin_log(log_path, done)
    asked = []
    handlers = {s: signal.signal(s, lambda *_: asked.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    busy, first, logged, stop = 0.0, done, done, False
    while done < cfg.max_steps and not stop:
        t = time.time()
        state, value = step(state, batches, rates(done, cfg))
        done += 1
        batches = batches_of(done)  # made while the device works
        value = float(value)  # waits for it
        busy += time.time() - t
        stop = bool(asked)
        if several:  # they all stop after the same step
            stop = bool(multihost_utils.process_allgather(np.array(stop)).any())
        if done == first + 1:
            started = time.time()  # the first step also compiled: the time left is reckoned from here
        if not math.isfinite(value):
            raise InputError(f"step {done}: the loss is {value}; {path} is from before, --init takes it;"
                             " try a smaller --learning_rate")
        last = done == cfg.max_steps or stop
        seen = "", ""
        due = lambda every: every > 0 and (done % every == 0 or done == cfg.max_steps)
        if validate and due(cfg.eval_every):
            seen = validate(state["params"])
            if about["kind"] == "base" and seen[0] < about.get("best", math.inf):
                about["best"] = seen[0]
                save(best)
        if due(cfg.log_every) or done == 1 or last or seen[0]:
            speed = (done - logged) * sum(batch[0].size for batch, _ in batches) / busy
            busy, logged = 0.0, done
            cells = [done, value, *seen, learning_rate(done - 1, cfg), round(speed), time.time() - began]
            with open(log_path if writes else os.devnull, "a") as log:
                log.write(",".join(f"{c:.6g}" if isinstance(c, float) else str(c) for c in cells) + "\n")
            validation = f"validation {seen[0]:.3f}  " if seen[0] else ""
            left = time_left(started, done - first - 1, cfg.max_steps - first - 1)
            show_progress(f"step {done}/{cfg.max_steps}  loss {value:.3f}  {validation}{speed:.0f} tokens/s,"
                          f" {speed * flops / 1e9:.0f} GFLOP/s  {left}", last=last or bool(validation))
        if last or due(cfg.save_every):
            save(path)
        if due(cfg.sample_every) and not last:
            show_sample(fetch(state["params"]))
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if stop:
        script = {"base": "gpt.py", "chat": "sft.py", "dpo": "sft.py --dpo"}[path.stem]
        where = "" if cfg.out_dir == "out" else f" --out_dir {cfg.out_dir}"
        print(f"interrupted at step {done}, saved in {path}; go on with: python {script} --resume{where}")
        sys.exit(130)
    rising = sum_up(log_path) if writes else 0
    if about["kind"] == "base" and rising:
        print(f"validation loss has risen for {rising} evaluation(s), the model begins to learn its text by heart;"
              f" best checkpoint: {best} (more text, fewer steps or --dropout help)")
    elif about["kind"] == "base" and writes:
        best.unlink(missing_ok=True)  # the same as the last one
    return fetch(state)


# ---------------------------------------------------------------- main


def join(cfg):
    """Become one of several processes, through JAX's own runtime; SLURM and Cloud TPU tell it all it needs. Process 0
    alone prints and writes files; out_dir and data_dir must be folders that all of them see."""
    slurm = os.environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_STEP_NODELIST" in os.environ
    if not (cfg.coordinator or slurm or "TPU_ML_PLATFORM" in os.environ):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = [cfg.coordinator, cfg.num_processes, cfg.process_id] if cfg.coordinator else []
    try:
        jax.distributed.initialize(*where, **({"heartbeat_timeout_seconds": 40} if NEW_JAX else {}))
    except (ValueError, IndexError) as e:
        raise InputError(f"--coordinator {cfg.coordinator}: HOST:PORT, and --process_id below --num_processes ({e})"
                         ) from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")


def main(argv):
    cfg, given = read_flags(Config, argv, __doc__)
    join(cfg)
    path, log_path = (pathlib.Path(cfg.out_dir) / name for name in ("base.npz", "log.csv"))
    start = path if cfg.resume else cfg.init
    if start:
        state, about, model, tokenizer = load_checkpoint(start)
        cfg = resume_config(cfg, given, about["config"] if cfg.resume else about["model"], start)
    data_dir = pathlib.Path(cfg.data_dir)
    if jax.process_count() > 1 and cfg.batch_size % jax.device_count():
        raise InputError(f"--batch_size {cfg.batch_size}: must be a multiple of the {jax.device_count()} devices")
    if not start and "data_dir" not in given and jax.process_count() == 1 and not (data_dir / "train.bin").exists():
        print(f"no {data_dir}/train.bin yet: running prepare.py")
        prepare.main(["--out_dir", str(data_dir)])
    data_tokenizer = Tokenizer.load(data_dir / "tokenizer.json")
    if "dtype" in given and cfg.dtype == "bfloat16" and backend() == "metal":
        raise InputError("--dtype bfloat16: not on Metal; leave it out")
    if not start:
        cfg = dataclasses.replace(cfg, vocab_size=data_tokenizer.size,
                                  dtype=fast_dtype() if cfg.dtype == "auto" else cfg.dtype)
        tokenizer, model = data_tokenizer, Model(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(Model)})
        if model.n_embd % (2 * model.n_head):
            raise InputError(f"--n_embd {model.n_embd}: must be a multiple of 2 x n_head = {2 * model.n_head}")
        state = dict(params=init_params(model, cfg.seed))
    if tokenizer.merges != data_tokenizer.merges:
        raise InputError(f"{data_dir}: another vocabulary than that of {start}")
    ids = load_tokens(data_dir / "train.bin", tokenizer, model.block_size + 1)
    validate = make_validation(load_tokens(data_dir / "val.bin", tokenizer, 2), tokenizer, model, cfg)
    count = sum(p.size for p in jax.tree.leaves(state["params"]))
    tokens = cfg.batch_size * cfg.grad_accum * model.block_size
    print(f"{placements(cfg.batch_size)[0].mesh.size} {backend()} device(s), {model.dtype}, {count:,}"
          f" parameters, {tokens} tokens a step, {len(ids)} tokens an epoch ({len(ids) / tokens:.0f} steps),"
          f" expected first loss ln {model.vocab_size} = {math.log(model.vocab_size):.3f}")
    if not cfg.resume:
        state = new_state(state["params"])
        about = dict(kind="base", model=dataclasses.asdict(model), tokenizer=tokenizer.to_json(), step=0, seconds=0.0)
    batch_at = functools.partial(random_batch, ids, cfg.batch_size, model.block_size, cfg.seed)
    generate = make_generator(model)

    def show_sample(params):
        rng = np.random.default_rng(cfg.seed)
        choose = lambda _, logits, history: sample(logits, history, rng, temperature=0.8, top_k=50)
        new = [step[0] for step in generate(params, [[END]], choose, 2 * model.block_size)]
        print(f"sample: {printable(tokenizer.decode(new))}\n")

    try:
        state = train(cfg, state, about, functools.partial(loss, model=model), batch_at, validate, path, log_path,
                      show_sample)
    except (RuntimeError, ValueError) as e:  # either, for a broken connection
        if jax.process_count() == 1:
            raise
        raise InputError(f"a process of this run died or is out of reach ({str(e).splitlines()[0]});"
                         " start all of them again with --resume") from None
    show_sample(state["params"])
    pairs = "" if (data_dir / "qa.jsonl").exists() else " PAIRS"
    print(f"checkpoint: {path}\nnext: python sft.py{pairs}   (or continue a text: python chat.py {path})")


if __name__ == "__main__":
    run(main)
