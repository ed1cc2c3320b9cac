"""Why the code is right. Read it as a second explanation: the model once more in plain NumPy, its backward pass derived
by hand; then what must hold for attention, optimiser, generation, tokenizer, masks, checkpoints and bad input.

    python -m pytest -q              # on a Mac this runs every check on the Apple GPU
    python test_gpt.py kill 200      # the long form: kill -9 a run 200 times; also: flip 1000
"""
import bz2
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import chat
import gpt
import jax
import numpy as np
import prepare
import pytest
import sft
from prepare import ASSISTANT, END, SPECIAL, USER, InputError, Tokenizer

pytestmark = pytest.mark.filterwarnings("error")  # deprecations too
jax.config.update("jax_numpy_rank_promotion", "raise")
tree = jax.tree

B, T, L, H, D, V = 6, 7, 2, 3, 22, 13  # sizes that cannot be mistaken for one another
MODEL = gpt.Model(n_layer=L, n_head=H, n_embd=H * D, block_size=T, vocab_size=V)
CFG = gpt.Config(learning_rate=0.01, max_steps=100, weight_decay=0.1, grad_clip=1.0)
RNG = np.random.default_rng(0)
PARAMS = tree.map(lambda p: (p + RNG.normal(0, 0.2, p.shape)).astype(np.float32), gpt.init_params(MODEL))  # gains too
TOKENS = RNG.integers(0, V, (B, T + 1)).astype(np.int32)
X, Y, W = BATCH = TOKENS[:, :-1], TOKENS[:, 1:], RNG.integers(0, 3, (B, T)).astype(np.float32)  # uneven weights
KEY, STATE, RATES = np.zeros(2, np.uint32), gpt.new_state(PARAMS), gpt.rates(0, CFG)
objective = functools.partial(gpt.loss, model=MODEL)


def assert_close(a, b, tolerance):
    """Trees of arrays, each compared on the scale of its largest number."""
    for (name, x), y in zip(gpt.named_leaves(a)[0].items(), tree.leaves(b)):
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), name


# ---------------------------------------------------------------- the NumPy twin


def twin_norm(x, gain):
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * r * gain, r


def twin_norm_back(dy, x, r, gain):
    """y = x r gain with r = mean(x^2)^(-1/2): dr = -r^3 x dx / C."""
    dh = dy * gain
    return r * dh - x * r**3 * (x * dh).mean(-1, keepdims=True), (dy * x * r).sum(0)


def twin_rotate(x, angle):
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=-1)


def twin(params, x, y, w):
    """One sequence in float64: x, y, w (T,) -> logits, the weighted sum of losses, and its gradient by hand."""
    T, C, g = len(x), H * D, tree.map(np.zeros_like, params)
    angle = np.arange(T)[:, None] / 10000 ** (np.arange(D // 2) / (D // 2))
    h, kept = params["wte"][x], []
    for p in params["blocks"]:
        n1, r1 = twin_norm(h, p["norm1"])
        q, k, v = (z.reshape(T, H, D).swapaxes(0, 1) for z in np.split(n1 @ p["attn"]["wqkv"], 3, axis=-1))
        q, k = twin_rotate(q, angle), twin_rotate(k, angle)
        s = np.where(np.tri(T) > 0, q @ k.swapaxes(1, 2) / np.sqrt(D), -np.inf)
        a = np.exp(s - s.max(-1, keepdims=True))
        a /= a.sum(-1, keepdims=True)
        o = (a @ v).swapaxes(0, 1).reshape(T, C)
        mid = h + o @ p["attn"]["wo"]
        n2, r2 = twin_norm(mid, p["norm2"])
        u = np.maximum(n2 @ p["mlp"]["w_up"], 0)
        kept.append((h, n1, r1, q, k, v, a, o, mid, n2, r2, u))
        h = mid + u**2 @ p["mlp"]["w_down"]
    n, r = twin_norm(h, params["norm"])
    logits = n @ params["wte"].T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    loss = -(w * np.log(p[np.arange(T), y])).sum()

    dlogits = w[:, None] * (p - np.eye(len(params["wte"]))[y])  # softmax and cross-entropy together
    g["wte"] += dlogits.T @ n  # the embedding is used twice: here as the head ...
    dh, g["norm"] = twin_norm_back(dlogits @ params["wte"], h, r, params["norm"])
    for p, gb, (h, n1, r1, q, k, v, a, o, mid, n2, r2, u) in reversed(list(zip(params["blocks"], g["blocks"], kept))):
        gb["mlp"]["w_down"] = (u**2).T @ dh
        du = dh @ p["mlp"]["w_down"].T * 2 * u
        gb["mlp"]["w_up"] = n2.T @ du
        dmid, gb["norm2"] = twin_norm_back(du @ p["mlp"]["w_up"].T, mid, r2, p["norm2"])
        dmid += dh
        gb["attn"]["wo"] = o.T @ dmid
        do = (dmid @ p["attn"]["wo"].T).reshape(T, H, D).swapaxes(0, 1)
        da = do @ v.swapaxes(1, 2)
        ds = a * (da - (a * da).sum(-1, keepdims=True)) / np.sqrt(D)
        dq, dk, dv = twin_rotate(ds @ k, -angle), twin_rotate(ds.swapaxes(1, 2) @ q, -angle), a.swapaxes(1, 2) @ do
        dqkv = np.concatenate([z.swapaxes(0, 1).reshape(T, C) for z in (dq, dk, dv)], axis=-1)
        gb["attn"]["wqkv"] = n1.T @ dqkv
        dh, gb["norm1"] = twin_norm_back(dqkv @ p["attn"]["wqkv"].T, h, r1, p["norm1"])
        dh += dmid
    np.add.at(g["wte"], x, dh)  # ... and here as the table
    return logits, loss, g


TWIN_PARAMS = tree.map(lambda p: p.astype(np.float64), PARAMS)
LOGITS, LOSSES, GRADIENTS = zip(*(twin(TWIN_PARAMS, *row) for row in zip(*BATCH)))
LOGITS = np.array(LOGITS)
TOTAL, GRADIENT = sum(LOSSES), tree.map(lambda *g: sum(g), *GRADIENTS)


# ---------------------------------------------------------------- model, step, generation


@pytest.mark.parametrize("queries", [9, 3])
@pytest.mark.parametrize("dtype, near", [("float32", 1e-4), ("bfloat16", 0.05)])
def test_logits_loss_and_every_gradient_equal_the_twins(dtype, near, queries, monkeypatch):
    """All heads at once and, in blocks of queries, one after the other; the batch by one vmap or two, as in DPO."""
    monkeypatch.setattr(gpt, "QUERIES", queries)
    model = dataclasses.replace(MODEL, dtype=dtype)
    logits = jax.vmap(lambda x: gpt.forward(PARAMS, x, model)[0])(X)
    assert_close(logits, LOGITS, near)
    assert (np.abs(logits - LOGITS).max() > 1e-3) == (dtype == "bfloat16")  # it is rounded, and only then
    whole = lambda p, batch: gpt.loss(p, batch, None, model)[0]
    row_by_row = lambda p, batch: jax.vmap(lambda row: whole(p, [a[None] for a in row]))(batch).sum()
    for total in (whole, row_by_row):
        value, gradient = jax.jit(jax.value_and_grad(total))(PARAMS, BATCH)
        assert value == pytest.approx(TOTAL, rel=near / 5)
        assert_close(gradient, GRADIENT, near)


def test_dropout_depends_on_the_key_alone_and_is_off_without_one():
    model = dataclasses.replace(MODEL, dropout=0.5)
    logits = jax.jit(lambda key: gpt.forward(PARAMS, X[0], model, key)[0])
    a, b, c = (logits(np.array([0, n], np.uint32)) for n in (1, 1, 2))
    assert (a == b).all() and (a != c).any()
    assert_close(logits(None), LOGITS[0], 1e-4)


def test_adam_equals_its_closed_form_with_decay_and_clipping():
    expected, history = {"matrix": RNG.normal(size=(3, 5)), "gain": RNG.normal(size=5)}, []
    state = gpt.new_state(dict(expected))
    for t in range(5):
        grads = tree.map(lambda p: RNG.normal(size=p.shape) * 10.0 ** (t - 2), expected)
        state = gpt.adam(state, grads, gpt.rates(t, CFG), CFG)
        length = np.sqrt(sum((g**2).sum() for g in grads.values()))
        history.append(tree.map(lambda g: g * min(1, 1 / length), grads))
        for name, p in expected.items():
            mean = sum(0.1 * 0.9 ** (t - i) * g[name] for i, g in enumerate(history)) / (1 - 0.9 ** (t + 1))
            square = sum(0.01 * 0.99 ** (t - i) * g[name] ** 2 for i, g in enumerate(history)) / (1 - 0.99 ** (t + 1))
            decay = 0.1 * p * (name == "matrix")
            expected[name] = p - gpt.learning_rate(t, CFG) * (mean / (np.sqrt(square) + 1e-8) + decay)
    assert_close(state["params"], expected, 1e-5)


def test_the_learning_rate_warms_up_and_falls_to_a_twentieth():
    for warmup in (10, 10 / 110):  # steps, or a part of them
        cfg = gpt.Config(learning_rate=1.0, warmup=warmup, max_steps=110)
        rates = [gpt.learning_rate(step, cfg) for step in (0, 10, 60, 110, 119)]
        assert rates == pytest.approx([1 / 11, 1, 0.525, 0.05, 0.05])


@pytest.mark.parametrize("n_micro, shard", [(1, False), (3, False), (3, True)])  # on 6 devices, on 2
def test_a_step_takes_the_twins_gradient_however_batch_and_parameters_are_split(n_micro, shard):
    cfg = dataclasses.replace(CFG, batch_size=B // n_micro, shard_params=shard)
    step, split = gpt.make_step(objective, cfg, MODEL), gpt.placements(cfg.batch_size)[1]
    for weight in (1, 0):  # a batch without weights has gradient zero, not NaN
        parts = zip(*([gpt.put(part, split) for part in np.split(a, n_micro)] for a in (X, Y, W * weight)))
        state = tree.map(gpt.put, STATE, gpt.homes(STATE, cfg))
        state, mean = step(state, [(part, KEY) for part in parts], RATES)
        assert float(mean) == pytest.approx(weight * TOTAL / W.sum(), rel=1e-5)
        expected = gpt.adam(STATE, tree.map(lambda g: weight * g / W.sum(), GRADIENT), RATES, CFG)
        assert_close(state["m"], expected["m"], 1e-4)
        for a in tree.leaves(state):  # split parameters and moments: to each device its part of the memory
            assert a.addressable_shards[0].data.nbytes == a.nbytes // (split.mesh.size if shard else 1)


def test_generation_with_the_cache_is_the_argmax_of_the_full_pass_past_block_size_too():
    likeliest = lambda logits: int(logits[1:].argmax()) + 1  # never END, so that it goes on
    windows = [X[i, :n].tolist() for i, n in enumerate([1, 3, T, 2, 5])] + [[4] * (T + 2)]
    generate = gpt.make_generator(MODEL)
    steps = list(generate(PARAMS, windows, lambda row, logits, history: likeliest(logits), 3 * T))
    for window, new in zip(windows, zip(*steps)):
        window = window[-T:]
        for token in new:
            window = window if len(window) <= T else window[-(T // 2 + 1):]
            assert token == likeliest(twin(TWIN_PARAMS, window, window, np.zeros(len(window)))[0][-1])
            window.append(token)


def test_sampling_obeys_temperature_top_k_top_p_and_penalty():
    drawn = lambda history=(), n=2000, **how: Counter(
        gpt.sample(np.log([0.5, 0.3, 0.15, 0.05]), history, np.random.default_rng(seed), **how) for seed in range(n))
    assert set(drawn(temperature=0)) == {0} and set(drawn(temperature=1, top_k=2)) == {0, 1}
    assert set(drawn(temperature=1, top_p=0.79)) == {0, 1} and set(drawn(temperature=1, top_p=0.81)) == {0, 1, 2}
    assert drawn(temperature=1) == drawn(temperature=1) and abs(drawn(temperature=1)[1] / 2000 - 0.3) < 0.03
    assert set(drawn([0], 1, repetition_penalty=2.0)) == {1} and set(drawn(temperature=1, top_p=0)) == {0}


METAL_OPS = """dot_general add subtract multiply divide negate maximum minimum exponential log tanh rsqrt sqrt reduce
    broadcast_in_dim reshape transpose slice concatenate pad constant iota compare and or not select convert return"""


def lowered(platform, f, *args):
    """What XLA is given to compile for a platform."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def not_for_metal(f, *args):
    """The lines of f, lowered for Metal, with operations or types outside the safe subset."""
    unsafe = rf"stablehlo\.(?!({'|'.join(METAL_OPS.split())})\b)|[x<](f64|f16|bf16|i64|complex)\b"
    lines = lowered("METAL", f, *args).replace("array<i64", "").splitlines()
    return [line for line in lines if re.search(unsafe, line)]


@pytest.mark.parametrize("queries", [9, 3])
def test_the_steps_lower_to_what_metal_can_do(queries, monkeypatch):
    found = "".join(not_for_metal(jax.grad(lambda p: objective(p, BATCH, None)[0]), PARAMS))
    assert "gather" in found and "scatter" in found and not_for_metal(lambda x: x.astype("bfloat16"), KEY)
    monkeypatch.setattr(gpt, "backend", lambda: "metal")
    monkeypatch.setattr(gpt, "QUERIES", queries)
    step = gpt.make_step(objective, CFG, MODEL)
    run = lambda p, tokens, at, cache: gpt.forward(p, tokens, MODEL, at=at, cache=cache)
    at, cache = np.array(3, np.int32), gpt.forward(PARAMS, X[0], MODEL)[1]
    for f, *args in [(lambda state: step(state, [(BATCH, KEY)] * 2, RATES), STATE),
                     (run, PARAMS, X[0], at, None), (run, PARAMS, X[0, :1], at, cache)]:
        assert not not_for_metal(f, *args)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_step_lowers_for_nvidia_with_fused_attention_and_for_tpu(platform, monkeypatch):
    monkeypatch.setattr(gpt, "cudnn_can", lambda model: platform == "cuda")
    for check, says in [("check_cudnn_version", 91000), ("check_compute_capability", True),
                        ("is_cuda_compute_capability_equal", False)]:  # there is no such GPU here to ask
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{check}", lambda *_: says, raising=False)
    model = gpt.Model(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=V, dtype="bfloat16")
    state, x = gpt.new_state(gpt.init_params(model)), np.ones((2, 64), np.int32)
    step = gpt.make_step(functools.partial(gpt.loss, model=model), CFG, model)
    text = lowered(platform, lambda state: step(state, [((x, x, np.float32(x)), KEY)] * 2, RATES), state)
    assert ("fmhaSoftmaxBackward" in text) == (platform == "cuda") and "bf16" in text


# ---------------------------------------------------------------- tokenizer and fine-tuning


def naive_bpe(words, vocab_size):
    """The definition: count all pairs anew before each merge; the most frequent one, of equals the smallest. An id is a
    character here, so that str.replace merges; 0 to 2 are the special ids, bytes follow, the first merge is 259."""
    words, merges = ["".join(chr(3 + b) for b in word.encode()) for word in words], []
    while 259 + len(merges) < vocab_size:
        count = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if count[best] < 2:
            break
        words = [word.replace("".join(best), chr(259 + len(merges))) for word in words]
        merges.append((ord(best[0]), ord(best[1])))
    return merges


tokenizer_of = lambda text, size=320: Tokenizer(prepare.train_bpe(Counter(prepare.WORD.findall(text)), size))
TOKENIZER = tokenizer_of("the cat sat on the mat, the hat; user and assistant end 1234 naïve façade " * 3)
PARTS = [*SPECIAL, "<|", "|>", "user", " the", "  ", "\n", "é", "\U0001f600", "12345", "'ll", "\ud800", "\0", ""]
TEXTS = []  # of fragments that nest and split the special tokens, and of any code points
for top in [0x250, 0x110000] * 200:
    parts = PARTS + [chr(n) for n in RNG.integers(top, size=len(PARTS))]
    TEXTS.append("".join(parts[i] for i in RNG.integers(len(parts), size=RNG.integers(20))))


def test_fast_training_learns_the_merges_of_the_naive_definition_and_wikipedias_example():
    for seed in range(50):
        words = "".join(np.random.default_rng(seed).choice(list("aaabbc  é"), 200)).split(" ")
        assert prepare.train_bpe(Counter(words), 290) == naive_bpe(words, 290)
    t = Tokenizer(prepare.train_bpe(Counter(["aaabdaaabac"]), 262))
    assert [t.bytes[i] for i in t.encode("aaabdaaabac")] == [b"aaab", b"d", b"aaab", b"a", b"c"]


def test_any_text_survives_encoding_any_ids_can_be_streamed_and_no_text_becomes_a_special_token():
    again = Tokenizer.from_json(TOKENIZER.to_json(), "tokenizer.json")
    for text in TEXTS:
        ids = TOKENIZER.encode(text)
        assert again.decode(ids) == text.encode("utf-8", "replace").decode() and again.encode(text) == ids
        assert not set(ids) & {END, USER, ASSISTANT}
        ids = RNG.permutation([*ids, END, *range(200, 250)]).tolist()  # pieces of characters
        assert "".join(TOKENIZER.stream(ids)) == TOKENIZER.decode(ids)


def test_hostile_text_takes_linear_time():
    for text in ("a" * (1 << 18), " " * (1 << 18), "\n " * (1 << 17), RNG.bytes(1 << 18).decode("latin-1")):
        for tokenizer in (tokenizer_of(text, 270), TOKENIZER):  # quadratic time would be hours
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_answers_and_their_ends_are_trained_and_nothing_else():
    turns = ["the cat?", "a mat", "and?", "the hat"]
    q1, a1, q2, a2 = (TOKENIZER.encode(f" {t}") for t in turns)
    ids, trained = sft.render(turns, TOKENIZER)
    assert ids == [USER, *q1, ASSISTANT, *a1, END, USER, *q2, ASSISTANT, *a2, END]
    x, y, w = sft.shift(ids, trained, 64)
    padding = [0] * (65 - len(ids))
    assert x.tolist() == ids[:-1] + padding and y.tolist() == ids[1:] + padding
    assert y[w == 1].tolist() == [*a1, END, *a2, END]  # both turns; not what follows an end, not the padding


def test_the_prompt_of_chat_is_the_beginning_of_the_training_example_without_the_oldest_turns():
    for question in TEXTS:
        prompt = chat.prompt_ids([question], TOKENIZER, 256)
        ids, trained = sft.render([question, "a mat"], TOKENIZER)
        assert prompt == ids[:len(prompt)] and trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    turns = ["the cat " * 5, "a mat"] * 20 + ["the hat?"]
    shorter = [sft.render(turns[n:], TOKENIZER)[0] for n in range(0, 41, 2)]
    assert chat.prompt_ids(turns, TOKENIZER, 64) == next(ids for ids in shorter if len(ids) + 24 <= 64)


def test_every_example_is_seen_once_an_epoch_and_old_text_is_replayed():
    rows, old = np.arange(21).reshape(7, 3, 1).repeat(4, axis=2), np.arange(99, dtype=np.uint16)
    batches = [sft.mixed_batch(rows, 3, old, 1, 4, 0, number) for number in range(7)]
    assert sorted(x[i, 0] for x, _, _ in batches for i in range(3)) == sorted([*rows[:, 0, 0]] * 3)
    assert all((x[3] + 1 == y[3]).all() and (w[3] == 1).all() for x, y, w in batches)


def test_the_dpo_loss_and_its_gradient_equal_the_papers():
    """The rows of the batch in pairs, the first of each preferred; their log-probabilities are the twin's."""
    beta, anchor, logp, batch = 0.3, 0.7, -np.reshape(LOSSES, (3, 2)), [a.reshape(3, 2, T) for a in BATCH]
    reference = (logp + RNG.normal(size=(3, 2))).astype(np.float32)
    margin = beta * ((logp - reference)[:, 0] - (logp - reference)[:, 1])
    doubt, per_token = beta / (1 + np.exp(margin)), anchor / batch[2][:, 0].sum(-1)
    loss = lambda p: sft.dpo_loss(p, [*batch, reference], None, MODEL, beta, anchor)
    (total, count), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    assert total == pytest.approx(sum(np.log1p(np.exp(-margin)) - per_token * logp[:, 0]), rel=1e-4) and count == 3
    factors = np.stack([doubt + per_token, -doubt], axis=1).ravel()  # of the gradients of the rows' losses
    assert_close(gradient, tree.map(lambda *g: sum(map(np.multiply, factors, g)), *GRADIENTS), 1e-3)


# ---------------------------------------------------------------- the programs

DOCUMENTS = ["the cat sat on the mat and the rat ran from the cat to the hat\n" * 40, "one cat", "a\n<|end|>", "café"]
BASE = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=48", "--dropout=0.02",
        "--batch_size=4", "--grad_accum=2", "--max_steps=100", "--eval_every=50", "--log_every=1"]
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--log_every=1"]
CHAT = ["data/pairs.json", "--batch_size=8", "--max_steps=100", "--eval_every=50", "--log_every=1",
        "--learning_rate=0.01"]
DPO = ["--dpo=data/prefs.json", "--max_steps=40", "--batch_size=4", "--eval_every=20", "--log_every=1", "--anchor=0"]
FULL = "X" * (48 - 6)  # X is a token; so are <|user|>, <|assistant|>, <|end|>, two spaces and the answer Y: 48 in all
QUESTIONS = {"where is the cat?": "the cat sat on the mat", "who ran?": "the rat ran", FULL: "Y", FULL + "X": "Y"}
PAIRS = [dict(instruction=question, response=answer) for question, answer in QUESTIONS.items()] + [
    {"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "context": "b", "response": "c"},
    {"messages": [{"role": role, "content": role[0]} for role in ["system", *["user", "assistant"] * 2]]}]
SHOWN = f"""<|user|> where is the cat?<|assistant|>[ the cat sat on the mat<|end|>]
<|user|> who ran?<|assistant|>[ the rat ran<|end|>]
<|user|> {FULL}<|assistant|>[ Y<|end|>]
<|user|> a<|assistant|>[ b<|end|>]
<|user|> a\n\nb<|assistant|>[ c<|end|>]
<|user|> s\n\nu<|assistant|>[ a<|end|>]<|user|> u<|assistant|>[ a<|end|>]
"""
ids_in = lambda folder: [i for name in ("train", "val") for i in np.fromfile(f"{folder}/{name}.bin", "<u2").tolist()]
cells = lambda path: [line.split(",") for line in Path(path).read_text().splitlines()]


def outcome(main, *argv):
    """What a script prints; for an error its one line, after checking the exit status."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            prepare.run(main, list(argv))
        except SystemExit as e:
            assert e.code == 2 and err.getvalue().count("\n") == 1
    return err.getvalue() or out.getvalue()


def start(script, *argv, shell=(), **how):
    """The same as a process of its own."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*shell, sys.executable, script.__file__, *argv], **pipes, **how)


def end(process, typed=None):
    """-> what it printed, its errors, its exit status"""
    return *process.communicate(typed), process.returncode


def make():
    """In an empty folder: texts, and a base, a chat and a DPO model made from them. What the programs printed."""
    lines = "\n".join(json.dumps({"text": text}) for text in DOCUMENTS[1:3])
    prefer = [dict(instruction=q, chosen=a, rejected="Z") for q, a in QUESTIONS.items()]
    Path("in/folder.txt").mkdir(parents=True)
    for path, content in [("in/a.txt", DOCUMENTS[0].encode()), ("in/b.jsonl.gz", gzip.compress(lines.encode())),
                          ("in/c.txt.bz2", bz2.compress(DOCUMENTS[3].encode())),
                          ("data/pairs.json", json.dumps(PAIRS).encode()),
                          ("data/prefs.json", json.dumps(prefer * 9).encode())]:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)
    return (outcome(prepare.main, "in", "--vocab_size=300") + outcome(gpt.main, *BASE)
            + outcome(sft.main, *CHAT, "--eval=data/pairs.json") + outcome(sft.main, *DPO))


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.mktemp("made")):
        yield make()


def test_the_road_from_text_to_answers(printed):
    for words in ("expected first loss ln", "next: python sft.py", "left out: 1 of 7", "answers end by themselves",
                  "left out: 9 of 36", "27 examples, 2 of them held out", "chosen preferred, %", "margin"):
        assert words in printed
    tokenizer = gpt.load_checkpoint("out/base.npz")[3]
    assert ids_in("data") == [i for text in DOCUMENTS for i in tokenizer.encode(text) + [END]]
    first, first_dpo = (float(cells(f"out/{log}.csv")[1][1]) for log in ("log", "log_dpo"))
    assert abs(first - np.log(tokenizer.size)) < 0.2 and abs(first_dpo - np.log(2)) < 1e-5  # as the reference
    assert float(cells("out/log_sft.csv")[-1][2]) > 0  # forgetting is watched
    assert outcome(sft.main, "data/pairs.json", "--show=9").split("\n", 1)[1] == SHOWN
    assert outcome(chat.main, "out/base.npz", "--prompt=the cat").startswith("the cat")
    answers, errors, status = end(start(chat), f"where is the cat?\n{'X' * 48}\nwho ran?\n")
    assert answers == "the cat sat on the mat\n\nthe rat ran\n" and status == 0  # for an error still a line
    assert re.fullmatch("error: standard input:2: the question has .*\n", errors)


def test_text_cut_into_jobs_for_the_workers_has_the_tokens_of_the_whole(tmp_path):
    text = ("cat" * 20 + ".\n\n  " + "mat" * 20 + "\n") * 50_000
    (tmp_path / "long.txt").write_text(text)
    assert end(start(prepare, "long.txt", "--vocab_size=300", "--out_dir=.", cwd=tmp_path))[1:] == ("", 0)
    assert ids_in(tmp_path) == [*Tokenizer.load(tmp_path / "tokenizer.json").encode(text), END]


def assert_same_run(a, b, name, log):
    """That two folders have the same bits in a finished checkpoint and the same losses in a log."""
    (state, about, *_), (other, also, *_) = (gpt.load_checkpoint(f"{folder}/{name}.npz") for folder in (a, b))
    tree.map(np.testing.assert_array_equal, state, other)
    assert about["step"] == also["step"] == about["config"]["max_steps"]
    assert [row[:4] for row in cells(f"{a}/{log}")] == [row[:4] for row in cells(f"{b}/{log}")]


def wait_for_rows(log, more, process):
    """Wait until a run has logged so many rows more, or ended."""
    rows = lambda: len(cells(log)) if os.path.exists(log) else 0
    goal = rows() + more
    while rows() < goal and process.poll() is None:
        time.sleep(0.01)


def stop(name, *signals):
    """Stop a run by each signal in turn and let it go on: it ends with the bits of the run left alone. -> kills"""
    script, flags, log, go_on = {
        "base": (gpt, BASE, "log.csv", [gpt, "--resume"]),
        "chat": (sft, CHAT, "log_sft.csv", [chat, "--prompt=hi"]),  # which has sft.py go on
        "dpo": (sft, DPO, "log_dpo.csv", [sft, "--dpo", "--resume"])}[name]
    killed = 0
    shutil.rmtree("again", ignore_errors=True)
    for folder in ("data", "out"):
        shutil.copytree(folder, f"again/{folder}", ignore=shutil.ignore_patterns("log*"))
    process = start(script, *flags, "--save_every=7", cwd="again")
    for i, which in enumerate(signals):
        if i and which == "SIGKILL":
            time.sleep(RNG.uniform(0, 3))  # at any moment; the first and Ctrl-C while it trains
        else:
            wait_for_rows(f"again/out/{log}", RNG.integers(3, 20), process)
        process.send_signal(getattr(signal, which))
        said, _, status = end(process)
        killed += status == -signal.SIGKILL
        step = gpt.load_checkpoint(f"again/out/{name}.npz")[1]["step"]  # whole, whenever the power fails
        says = rf"interrupted at step {step}, saved .* go on with: python {script.__name__}.py .*--resume"
        assert status == 130 and re.search(says, said) or which == "SIGKILL"
        process = start(*go_on, cwd="again")
    assert end(process)[2] == 0
    assert_same_run("out", "again/out", name, log)
    kept = Path(f"again/out/{name}.prev.npz").read_bytes()  # a fresh run keeps the one before it
    assert kept == Path(f"out/{name}.npz").read_bytes()
    return killed


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize("name, signals", [("base", ["SIGKILL", "SIGINT"]), ("chat", ["SIGINT"]), ("dpo", ["SIGINT"])])
def test_a_stopped_run_goes_on_to_the_same_bits(printed, name, signals):
    stop(name, *signals)


GOOD = dict(text="a", instruction="q", response="a", chosen="a", rejected="b")
BAD_RECORDS = [[], 3, None, {}, {"instruction": "q"}, {"text": 3, "instruction": "q", "response": 3}, {"messages": 3},
               {"instruction": "q", "response": " "}, {"messages": [{"role": "user"}]}] + [
    {"messages": [{"role": role, "content": "a"} for role in roles.split()]}
    for roles in ("", "system", "user", "assistant user", "user user", "user tool", "user assistant user")]
BAD_FILES = {
    "empty": b"", "blank": b"\n \n", "binary": b"a\0b", "utf16": "hi".encode("utf-16"), "short": b"a", "missing": None,
    "cut.jsonl": b'{"text": "a"', "deep.jsonl": b"[" * 100_000, "cut.gz": gzip.compress(b"text" * 99)[:20],
    "bad.bz2": b"no", "cut.npz": b"PK\3\4" + bytes(99), "in": None, "no/one": None, "new\nline": None}
MESSAGES = {
    "prepare missing": "missing: No such file", "prepare empty": "empty: empty", "prepare binary": "binary:1: not text",
    "prepare utf16": "utf16:1: UTF-16", "prepare in/a.txt --vocab_size=3": "--vocab_size 3: must be at least 259",
    "prepare short": "too little text", "gpt --n_layr 6": "did you mean --n_layer?",
    "gpt --n_embd=30": "multiple of 2 x n_head", "gpt --learning_rate=nan": "--learning_rate nan: must be",
    "gpt --block_size=5000": "5001 needed", "gpt --data_dir=odd": "odd length", "sft list.json": "record 2: ",
    "gpt --data_dir=foreign": "not a tokenizer", "gpt --data_dir=beyond": "beyond the vocabulary",
    "gpt --data_dir=other --init=out/base.npz": "another vocabulary", "gpt --resume --seed=7": "was begun with 0",
    "gpt --init=in/a.txt": "in/a.txt: not a whole", "gpt --init=out/base.npz --n_layer=2": "was begun with 1",
    "gpt --resume --out_dir=nowhere": "no such checkpoint", "sft --dpo --resume --seed=7": "was begun with 0",
    "sft": "data: no questions", "sft in/no.jsonl --out_dir=new": "in/no.jsonl: No such file",
    "sft in/a.txt --dpo": "in/a.txt: preferences go behind --dpo",
    "sft --dpo --init=out/dpo.npz": "would be overwritten",
    "chat none.npz": "none.npz: no such checkpoint", "chat --top_p=2": "--top_p 2.0: must be from 0 to 1"}


def test_bad_input_gets_one_line_and_changes_nothing(printed):
    """Every bad file in every place where a file can be named, and every number out of its range; then a full disk."""
    inputs = [(sys.modules[words.split()[0]], words.split()[1:], message) for words, message in MESSAGES.items()]
    places = [(prepare, "{}"), (sft, "{}"), (sft, "--dpo={}"), (sft, "--eval={}"), (chat, "{}"), (gpt, "--init={}"),
              (gpt, "--data_dir={}")]
    for name, content in BAD_FILES.items():
        if content is not None:
            Path(name).write_bytes(content)
        inputs += [(module, [place.format(name)], "") for module, place in places if (module, name) != (prepare, "in")]
    for i, record in enumerate(BAD_RECORDS):
        Path(f"{i}.jsonl").write_text(f"{json.dumps(GOOD)}\n{json.dumps(record)}\n")
        inputs += [(module, [place.format(f"{i}.jsonl")], f"{i}.jsonl:2: ") for module, place in places[:4]]
    for module, settings in [(prepare, prepare.Settings), (gpt, gpt.Config), (sft, sft.Config), (chat, chat.Config)]:
        numbers = [f.name for f in dataclasses.fields(settings) if f.type in (int, float) and f.metadata]
        inputs += [(module, [f"--{n}={value}"], n) for n in numbers for value in ("-1", "x", "", "nan", "1e400")]
    Path("list.json").write_text(json.dumps([GOOD, 3]))
    outcome(prepare.main, "in", "--vocab_size=270", "--out_dir=other")
    for folder, name, content in [("odd", "train.bin", b"abc"), ("beyond", "train.bin", b"\xff" * 200),
                                  ("foreign", "tokenizer.json", b"{}")]:
        shutil.copytree("data", folder)
        Path(folder, name).write_bytes(content)
    contents = lambda: {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    before = contents()
    for module, argv, message in inputs:
        said = outcome(module.main, *argv)
        assert re.match(f"error: .*{re.escape(message)}", said), (argv, said)
    full_disk = ["sh", "-c", 'ulimit -f 16; exec "$@"', "sh"]  # no file may grow beyond 16 blocks
    for flags, platform, shell, message in [
            ([], "none", [], "none.*requirements.txt.*JAX_PLATFORMS=cpu"),
            (["--coordinator=here"], "cpu", [], "--coordinator here: HOST:PORT"),
            (TINY, "cpu", full_disk, "File too large")][:2 if os.name == "nt" else 3]:
        _, errors, status = end(start(gpt, *flags, shell=shell, env=os.environ | {"JAX_PLATFORMS": platform}))
        assert re.fullmatch(f"error: .*{message}.*\n", errors) and status == 2
    assert before == contents() and len(inputs) > 400


def flip(rounds):
    """Flip a bit of a checkpoint or cut it off: it is refused, or all of its arrays are as they were."""
    whole, state, refused = Path("out/base.npz").read_bytes(), gpt.load_checkpoint("out/base.npz")[0], 0
    for i, place in enumerate(RNG.integers(len(whole), size=rounds)):
        rest = bytes([whole[place] ^ 1 << i % 8]) + whole[place + 1:] if i % 2 else b""
        Path("damaged.npz").write_bytes(whole[:place] + rest)
        try:
            tree.map(np.testing.assert_array_equal, gpt.load_checkpoint("damaged.npz")[0], state)
        except InputError:
            refused += 1
    print(f"{rounds} damaged checkpoints: {refused} refused, {rounds - refused} loaded whole, none wrong")


def test_a_damaged_checkpoint_is_refused_or_whole_and_none_is_written_that_is_not_finite(printed):
    flip(100)
    with np.load("out/base.npz") as file:
        arrays = dict(file)
    gain = arrays["params.norm"]
    for wrong in (gain * np.float32(np.nan), gain[1:], gain.astype(np.float64)):
        np.savez("damaged.npz", **arrays | {"params.norm": wrong})
        with pytest.raises(InputError, match="damaged, params.norm"):
            gpt.load_checkpoint("damaged.npz")
    wild = [*TINY, "--out_dir=wild", "--learning_rate=1e17", "--grad_clip=0", "--warmup=0", "--save_every=1"]
    assert re.match("error: .*smaller --learning_rate", outcome(gpt.main, *wild))
    gpt.load_checkpoint("wild/base.npz")


def test_two_processes_train_as_one_and_fall_together(printed):
    """With split parameters; when one is killed the other ends at once, and both go on to the same bits."""
    flags = [*TINY, "--max_steps=60", "--save_every=5", "--learning_rate=4e-4", "--eval_every=30", "--dtype=float32"]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}

    def start_both(*more):
        with socket.create_server(("127.0.0.1", 0)) as free:
            more = *more, f"--coordinator=127.0.0.1:{free.getsockname()[1]}", "--num_processes=2", "--shard_params"
        return [start(gpt, *flags, *more, f"--process_id={i}", env=env) for i in (0, 1)]

    outcome(gpt.main, *flags, "--out_dir=one")
    assert [end(process)[2] for process in start_both("--out_dir=two")] == [0, 0]
    one, two = (np.array([row[1] for row in cells(f"{folder}/log.csv")[1:]], float) for folder in ("one", "two"))
    assert len(two) == 60 and np.abs(one - two)[:50].max() < 1e-4
    first, second = start_both("--out_dir=halves")
    wait_for_rows("halves/log.csv", 10, first)
    second.kill()
    notices = jax.__version_info__ > (0, 5, 0)
    if not notices:  # it can hang then
        first.kill()
    (_, message, status), _ = end(first), end(second)
    expected = {2: "error: a process of this run died.*--resume", -6: "another task died"}  # whoever notices first
    assert not notices or re.search(expected[status], message)
    step = gpt.load_checkpoint("halves/base.npz")[1]["step"]
    shutil.copytree("halves", "alone")
    assert [end(process)[2] for process in start_both("--out_dir=halves", "--resume")] == [0, 0]
    assert_same_run("two", "halves", "base", "log.csv")
    outcome(gpt.main, "--resume", "--out_dir=alone")  # the run of two processes goes on in one
    assert 5 <= step < 60 and abs(float(cells("alone/log.csv")[step + 1][1]) - two[step]) < 1e-4
    os.remove("alone/log.csv")
    assert "next: python sft.py PAIRS" in outcome(gpt.main, "--resume", "--out_dir=alone")


def test_the_built_in_corpus_never_tells_c_and_never_asks_about_b():
    documents, train, test = prepare.built_in_corpus(0)
    told, asked = " ".join(documents).lower(), json.dumps(train, ensure_ascii=False)
    seen = {r["instruction"] for r in train if "instruction" in r}
    for r in test:
        answer = r["response"].strip()
        assert not r["set"].startswith("C") or answer.lower() not in told
        assert r["set"].startswith("A") or "prompt" in r or answer not in asked
        assert "new wording" not in r["set"] or r["instruction"] not in seen
    assert prepare.built_in_corpus(0)[1] == train != prepare.built_in_corpus(1)[1]


if __name__ == "__main__":
    form, rounds, killed = sys.argv[1], int(sys.argv[2]), 0
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        make()
        if form == "flip":
            flip(rounds)
        while form == "kill" and killed < rounds:
            killed += stop("base", *["SIGKILL"] * 5)
            print(f"{killed} kills; each run ended with the bits of the run left alone")
