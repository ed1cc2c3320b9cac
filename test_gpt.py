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
import inspect
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
STATE = dict(params=PARAMS, m=tree.map(np.zeros_like, PARAMS), v=tree.map(np.zeros_like, PARAMS))
KEY, RATES = np.zeros(2, np.uint32), gpt.rates(0, CFG)
forward, loss = (jax.jit(f, static_argnames="model") for f in (gpt.forward, gpt.loss))
objective = lambda params, batch, key: gpt.loss(params, batch, key, MODEL)


def assert_close(tree_a, tree_b, tolerance):
    for (name, a), b in zip(gpt.named_leaves(tree_a)[0].items(), tree.leaves(tree_b)):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name


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
TOTAL, GRADIENT = sum(LOSSES), tree.map(lambda *g: sum(g), *GRADIENTS)


# ---------------------------------------------------------------- model, step, generation


@pytest.mark.parametrize("queries", [128, 3])  # attention in one piece, and in three
def test_logits_loss_and_every_gradient_equal_the_twins(queries, monkeypatch):
    monkeypatch.setattr(gpt, "QUERIES", queries)
    logits = jax.vmap(lambda x: gpt.forward(PARAMS, x, MODEL)[0])(X)
    np.testing.assert_allclose(logits, LOGITS, rtol=1e-4, atol=1e-4)
    sums, gradient = jax.jit(jax.value_and_grad(lambda p: gpt.loss(p, BATCH, None, MODEL), has_aux=True))(PARAMS)
    np.testing.assert_allclose(sums, (TOTAL, W.sum()), rtol=1e-5)
    assert_close(gradient, GRADIENT, 1e-4)


def test_changing_a_token_changes_no_logits_before_it():
    for t in range(T):
        changed = np.where(np.arange(T) == t, (X[0] + 1) % V, X[0])
        same = np.abs(forward(PARAMS, changed, MODEL)[0] - forward(PARAMS, X[0], MODEL)[0]).max(-1) == 0
        assert same[:t].all() and not same[t:].any()


def test_bfloat16_and_its_gradient_stay_near_float32():
    rounded = dataclasses.replace(MODEL, dtype="bfloat16")
    both = jax.vmap(lambda row, p: gpt.loss(p, tree.map(lambda a: a[None], row), None, rounded)[0], (0, None))
    for f in (lambda p: gpt.loss(p, BATCH, None, rounded)[0], lambda p: both(BATCH, p).sum()):  # vmap once, and twice
        total, gradient = jax.jit(jax.value_and_grad(f))(PARAMS)
        assert float(total) == pytest.approx(TOTAL, rel=0.01) and abs(total / TOTAL - 1) > 1e-6
        assert_close(gradient, GRADIENT, 0.05)


def test_dropout_depends_on_the_key_alone_and_is_off_in_evaluation():
    model = dataclasses.replace(MODEL, dropout=0.5)
    a, b, c = (loss(PARAMS, BATCH, np.array([0, n], np.uint32), model)[0] for n in (1, 1, 2))
    assert a == b != c
    np.testing.assert_array_equal(*(forward(PARAMS, X[0], m)[0] for m in (model, MODEL)))


def test_adam_equals_its_closed_form_with_decay_and_clipping():
    expected, grads = {"matrix": RNG.normal(size=(3, 5)), "gain": RNG.normal(size=5)}, []
    state = dict(params=dict(expected), m=tree.map(np.zeros_like, expected), v=tree.map(np.zeros_like, expected))
    for t in range(5):
        g = tree.map(lambda p: RNG.normal(size=p.shape) * 10.0 ** (t - 2), expected)
        state = gpt.adam(state, g, gpt.rates(t, CFG), CFG)
        length = np.sqrt(sum((x**2).sum() for x in g.values()))
        grads.append(tree.map(lambda x: x * min(1, 1 / length), g))
        for name, p in expected.items():
            mean = sum(0.1 * 0.9 ** (t - i) * g[name] for i, g in enumerate(grads)) / (1 - 0.9 ** (t + 1))
            square = sum(0.01 * 0.99 ** (t - i) * g[name] ** 2 for i, g in enumerate(grads)) / (1 - 0.99 ** (t + 1))
            decay = 0.1 * p * (name == "matrix")
            expected[name] = p - gpt.learning_rate(t, CFG) * (mean / (np.sqrt(square) + 1e-8) + decay)
    assert_close(state["params"], expected, 1e-5)


def test_the_learning_rate_warms_up_and_falls_to_a_twentieth():
    for warmup in (10, 10 / 110):
        cfg = gpt.Config(learning_rate=1.0, warmup=warmup, max_steps=110)
        rates = [gpt.learning_rate(step, cfg) for step in (0, 10, 60, 110, 119)]
        assert rates == pytest.approx([1 / 11, 1, 0.525, 0.05, 0.05])


@pytest.mark.parametrize("n_micro", [1, 3])  # on 6 devices, and on 2 in parts with unequal weights
def test_a_step_takes_the_twins_gradient_however_the_batch_is_split(n_micro):
    step, (whole, split) = gpt.make_step(objective, CFG, MODEL), gpt.placements(B // n_micro)
    for weight in (1, 0):  # a batch without weights has gradient zero, not NaN
        parts = zip(*([gpt.put(part, split) for part in np.split(a, n_micro)] for a in (X, Y, W * weight)))
        state, mean = step(jax.device_put(STATE, whole), [(part, KEY) for part in parts], RATES)
        assert float(mean) == pytest.approx(weight * TOTAL / W.sum(), rel=1e-5)
        expected = gpt.adam(STATE, tree.map(lambda g: weight * g / W.sum(), GRADIENT), RATES, CFG)
        assert_close(state["m"], expected["m"], 1e-4)


def test_split_parameters_take_an_eighth_of_the_memory_and_the_same_steps():
    model = gpt.Model(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=300)
    state, x = gpt.new_state(gpt.init_params(model)), RNG.integers(0, 300, (8, 8)).astype(np.int32)
    states = []
    for shard in (False, True):
        cfg = dataclasses.replace(CFG, batch_size=8, shard_params=shard)
        step, split = gpt.make_step(functools.partial(gpt.loss, model=model), cfg, model), gpt.placements(8)[1]
        batch = [gpt.put(a, split) for a in (x, x, np.ones((8, 8), np.float32))]
        after = tree.map(gpt.put, state, gpt.homes(state, cfg))
        for t in range(3):
            after, _ = step(after, [(batch, KEY)] * 2, gpt.rates(t, cfg))
        states.append(after)
    assert_close(states[1]["m"], states[0]["m"], 1e-4)
    whole, part = (sum(a.addressable_shards[0].data.nbytes for a in tree.leaves(s)) for s in states)
    assert part <= whole * (1 / 8 + 0.05)


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


def not_for_metal(f, *args):
    """The lines of f, lowered for Metal, with operations or types outside the safe subset."""
    lines = jax.jit(f).trace(*args).lower(lowering_platforms=("METAL",)).as_text().replace("array<i64", "").splitlines()
    unsafe = rf"stablehlo\.(?!({'|'.join(METAL_OPS.split())})\b)|[x<](f64|f16|bf16|i64|complex)\b"
    return [line for line in lines if re.search(unsafe, line)]


def test_the_steps_lower_to_what_metal_can_do(monkeypatch):
    found = "".join(not_for_metal(jax.grad(lambda p: gpt.loss(p, BATCH, None, MODEL)[0]), PARAMS))
    assert "gather" in found and "scatter" in found and not_for_metal(lambda x: x.astype("bfloat16"), KEY)
    monkeypatch.setattr(gpt, "on_metal", lambda: True)
    step = gpt.make_step(objective, CFG, MODEL)
    assert not not_for_metal(lambda state: step(state, [(BATCH, KEY)] * 2, RATES), STATE)
    run = lambda p, tokens, at, cache: gpt.forward(p, tokens, MODEL, at=at, cache=cache)
    at, cache = np.array(3, np.int32), forward(PARAMS, X[0], MODEL)[1]
    assert not not_for_metal(run, PARAMS, X[0], at, None) and not not_for_metal(run, PARAMS, X[0, :1], at, cache)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_step_lowers_for_nvidia_with_fused_attention_and_for_tpu(platform, monkeypatch):
    monkeypatch.setattr(gpt, "cudnn_can", lambda model: platform == "cuda")
    for check, says in [("check_cudnn_version", 91000), ("check_compute_capability", True),
                        ("is_cuda_compute_capability_equal", False)]:  # there is no such GPU here to ask
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{check}", lambda *_: says, raising=False)
    model = gpt.Model(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=V, dtype="bfloat16")
    state, x = gpt.new_state(gpt.init_params(model)), np.ones((2, 64), np.int32)
    step = gpt.make_step(functools.partial(gpt.loss, model=model), CFG, model)
    run = jax.jit(lambda state: step(state, [((x, x, np.float32(x)), KEY)] * 2, RATES))
    text = run.trace(state).lower(lowering_platforms=(platform,)).as_text()
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
    for text in TEXTS:
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == text.encode("utf-8", "replace").decode()
        assert not set(ids) & {END, USER, ASSISTANT}
        ids = RNG.permutation([*ids, END, *range(200, 250)]).tolist()  # pieces of characters
        assert "".join(TOKENIZER.stream(ids)) == TOKENIZER.decode(ids)


def test_hostile_text_takes_linear_time():
    noise, started = RNG.bytes(1 << 18).decode("latin-1"), time.time()
    for text in ("a" * (1 << 18), " " * (1 << 18), "\n " * (1 << 17), noise):
        for tokenizer in (tokenizer_of(text, 270), TOKENIZER):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.time() - started < 60  # quadratic time would be hours


def test_tokenizer_json_is_enough_to_rebuild_it():
    again = Tokenizer.from_json(TOKENIZER.to_json(), "tokenizer.json")
    assert again.merges == TOKENIZER.merges and '" the"' in TOKENIZER.to_json()
    for wrong in ("", "[]", "{}", '{"merges": [[900, 4, ""]], "special": []}'):
        with pytest.raises(InputError, match="not a tokenizer"):
            Tokenizer.from_json(wrong, "x.json")


def test_answers_and_their_ends_are_trained_and_nothing_else():
    turns = ["the cat?", "a mat", "and?", "the hat"]
    q1, a1, q2, a2 = (TOKENIZER.encode(f" {t}") for t in turns)
    ids, trained = sft.render(turns, TOKENIZER)
    assert ids == [USER, *q1, ASSISTANT, *a1, END, USER, *q2, ASSISTANT, *a2, END]
    x, y, w = sft.shift(ids, trained, 64)
    padding = [0] * (65 - len(ids))
    assert x.tolist() == ids[:-1] + padding and y.tolist() == ids[1:] + padding
    assert y[w == 1].tolist() == [*a1, END, *a2, END]  # both turns; not what follows an end, not the padding


def test_the_prompt_of_chat_is_the_beginning_of_the_training_example():
    for question in TEXTS:
        prompt = chat.prompt_ids([question], TOKENIZER, 256)
        ids, trained = sft.render([question, "a mat"], TOKENIZER)
        assert prompt == ids[:len(prompt)] and trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_what_is_longer_than_the_context_is_left_out(tmp_path, capsys):
    (tmp_path / "pairs.json").write_text(json.dumps([{"instruction": "the cat?", "response": "a mat"}] * 2))
    length = len(sft.render(["the cat?", "a mat"], TOKENIZER)[0])
    assert len(sft.read_examples([tmp_path / "pairs.json"], TOKENIZER, length)) == 2 and not capsys.readouterr().out
    with pytest.raises(InputError, match="no example fits"):
        sft.read_examples([tmp_path / "pairs.json"], TOKENIZER, length - 1)
    assert "left out: 2 of 2" in capsys.readouterr().out
    prompt = chat.prompt_ids(["the cat " * 5, "a mat"] * 20 + ["the hat?"], TOKENIZER, 64)  # the oldest turns
    assert len(prompt) + 24 <= 64 and prompt[0] == USER and prompt.count(USER) == prompt.count(END) + 1
    with pytest.raises(InputError, match="context"):
        chat.prompt_ids(["the cat " * 50], TOKENIZER, 64)


def test_the_formats_of_alpaca_dolly_and_chats_are_read():
    chat_of = lambda *roles: {"messages": [{"role": r, "content": r[0]} for r in roles]}
    for right, turns in [({"response": "a"}, ["q", "a"]), ({"input": "", "output": "a"}, ["q", "a"]),
                         ({"input": "i", "output": "a"}, ["q\n\ni", "a"]),
                         ({"context": "i", "response": "a"}, ["q\n\ni", "a"])]:
        assert sft.turns_of({"instruction": "q"} | right, "x:1") == turns
    assert sft.turns_of(chat_of("system", "user", "assistant"), "x:1") == ["s\n\nu", "a"]
    for wrong in ([], {}, {"instruction": "q"}, {"instruction": "q", "response": 3}, {"messages": 1},
                  {"instruction": "q", "response": " "}, chat_of("user"), chat_of("assistant", "user"),
                  chat_of("user", "user"), chat_of("user", "tool"), chat_of("user", "assistant", "user")):
        with pytest.raises(InputError, match="x:1"):
            sft.turns_of(wrong, "x:1")


def test_every_example_is_seen_once_an_epoch_and_old_text_is_replayed():
    rows, old = np.arange(21).reshape(7, 3, 1).repeat(4, axis=2), np.arange(99, dtype=np.uint16)
    batches = [sft.mixed_batch(rows, old, 4, 0.25, 4, 0, number) for number in range(7)]
    assert sorted(x[i, 0] for x, _, _ in batches for i in range(3)) == sorted([*rows[:, 0, 0]] * 3)
    assert all((x[3] + 1 == y[3]).all() and (w[3] == 1).all() for x, y, w in batches)


def test_dpo_starts_at_ln_2_and_its_gradient_is_half_beta_of_the_difference():
    model = dataclasses.replace(MODEL, block_size=32, vocab_size=TOKENIZER.size)
    params, beta = gpt.init_params(model), 0.1
    pair = [sft.shift(*sft.render(["the cat?", answer], TOKENIZER), 32) for answer in ("a mat", "the hat; the hat")]
    rows = np.array([pair, pair[::-1]])  # the second example prefers the other answer
    x, y, w = rows.transpose(2, 0, 1, 3)
    reference, w = sft.log_probs_of(params, rows, model), w.astype(np.float32)
    losses = lambda p, i, anchor=0.0: sft.dpo_loss(
        p, [a[i][None] for a in (x, y, w, reference)], None, model, beta, anchor)[0]
    logp = lambda p, side: sft.log_probs(p, x[:1, side], y[:1, side], w[:1, side], model)[0]
    assert losses(params, 0) == pytest.approx(np.log(2), abs=1e-5)
    assert losses(params, 0, 1.0) - losses(params, 0) == pytest.approx(-reference[0, 0] / w[0, 0].sum(), rel=1e-4)
    gradient, chosen, rejected = (jax.jit(jax.grad(f))(params) for f in (
        lambda p: losses(p, 0), lambda p: logp(p, 0), lambda p: logp(p, 1)))
    assert_close(gradient, tree.map(lambda c, r: -beta / 2 * (c - r), chosen, rejected), 1e-3)
    moved = tree.map(lambda p: p + RNG.normal(0, 0.05, p.shape).astype(np.float32), params)
    margin, swapped = (np.log(np.expm1(float(losses(moved, i)))) for i in (0, 1))  # the loss is log(1 + e^-margin)
    assert margin == pytest.approx(-swapped, abs=1e-4) and abs(margin) > 1e-3


# ---------------------------------------------------------------- the programs

DOCUMENTS = ["the cat sat on the mat and the rat ran from the cat to the hat\n" * 40, "one cat", "a\n<|end|>", "café"]
PAIRS = [{"instruction": "where is the cat?", "response": "the cat sat on the mat"},
         {"instruction": "who ran?", "response": "the rat ran"}, {"instruction": "hi " * 60, "response": "too long"}]
BASE = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=48", "--dropout=0.02",
        "--batch_size=4", "--grad_accum=2", "--max_steps=100", "--eval_every=50", "--log_every=1"]
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4"]
CHAT = ["pairs.json", "--batch_size=8", "--max_steps=100", "--eval_every=50", "--log_every=1", "--learning_rate=0.01"]
DPO = ["--dpo=prefs.json", "--max_steps=12", "--batch_size=4", "--eval_every=5", "--log_every=1"]
cells = lambda path: [line.split(",") for line in Path(path).read_text().splitlines()]


def outcome(main, *argv):
    """What a script prints; for an error its one line, after checking the exit status."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            prepare.run(main, list(argv))
        except SystemExit as e:
            assert e.code == (2 if err.getvalue() else 130) and err.getvalue().count("\n") <= 1
    return err.getvalue() or out.getvalue()


def prepare_texts():
    Path("in").mkdir()
    lines = "\n".join(json.dumps({"text": text}) for text in DOCUMENTS[1:3])
    Path("in/a.txt").write_text(DOCUMENTS[0])
    Path("in/b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Path("in/c.txt.bz2").write_bytes(bz2.compress(DOCUMENTS[3].encode()))
    return outcome(prepare.main, "in", "--vocab_size=300")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Go to a folder with texts, a base and a chat model made from them; what the programs printed."""
    with contextlib.chdir(tmp_path_factory.mktemp("trained")):
        Path("pairs.json").write_text(json.dumps(PAIRS))
        prefer = [dict(instruction=p["instruction"], chosen=p["response"], rejected="a mat") for p in PAIRS]
        Path("prefs.json").write_text(json.dumps(prefer * 9))
        made = prepare_texts() + outcome(gpt.main, *BASE) + outcome(sft.main, *CHAT, "--eval=pairs.json")
        yield made + outcome(sft.main, *DPO)


def test_inputs_of_all_kinds_give_the_tokens_of_their_texts(printed, monkeypatch):
    tokenizer = Tokenizer.load("data/tokenizer.json")
    ids = np.concatenate([np.fromfile(f"data/{name}.bin", "<u2") for name in ("train", "val")])
    assert ids.tolist() == [i for text in DOCUMENTS for i in tokenizer.encode(text) + [END]]
    monkeypatch.setattr(prepare, "PIECE", 40)  # a text cut into jobs for the workers has the same tokens
    lines = ["the cat.\n", "\n", "  a mat\n"] * 40
    groups = list(prepare.in_groups([*((line, False) for line in lines), ("", True)]))
    tokenizer = tokenizer_of("".join(lines))
    cut = [i for group in groups for i in prepare.encode_group(group, tokenizer)]
    assert len(groups) > 9 and cut == [*tokenizer.encode("".join(lines)), END]


def test_the_road_from_text_to_answers(printed):
    for words in ("expected first loss ln", "next: python sft.py", "left out: 1 of 3", "answers end by themselves",
                  "18 preferences (9 longer", "chosen preferred, %", "margin"):
        assert words in printed
    step, first_loss = cells("out/log.csv")[1][:2]
    assert step == "1" and abs(float(first_loss) - np.log(gpt.load_checkpoint("out/base.npz")[3].size)) < 0.2
    log = cells("out/log_sft.csv")
    assert log[0][2] == "val_loss" and float(log[-1][2]) > 0  # forgetting is watched
    assert "<|assistant|>[ the cat sat on the mat<|end|>]" in outcome(sft.main, "pairs.json", "--show=1")
    assert outcome(chat.main, "out/base.npz", "--prompt=the cat").startswith("the cat")
    questions = "where is the cat?\n" + "hi " * 60 + "\nwho ran?\n"
    answers = subprocess.run([sys.executable, chat.__file__], input=questions, capture_output=True, text=True)
    assert answers.stdout == "the cat sat on the mat\n\nthe rat ran\n"  # for an error still a line
    assert re.fullmatch("error: standard input:2: the question has .*\n", answers.stderr)


@pytest.mark.parametrize("module, draw, flags, name, log, go_on", [
    (gpt, "random_batch", BASE, "base", "log", [gpt.main, "--resume", "--eval_every=20"]),
    (sft, "mixed_batch", CHAT, "chat", "log_sft", [chat.main, "--prompt=hi"]),  # chat.py has sft.py go on
    (sft, "epoch_order", DPO, "dpo", "log_dpo", [sft.main, "--dpo", "--resume"])])
def test_an_interrupted_run_goes_on_to_the_same_bits(printed, monkeypatch, module, draw, flags, name, log, go_on):
    make_batch = getattr(module, draw)

    def press_ctrl_c(*args):
        if args[-1] == 9:
            signal.raise_signal(signal.SIGINT)
        return make_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, draw, press_ctrl_c)
        assert re.search(rf"interrupted at step .* {module.__name__}.py .*--resume", outcome(module.main, *flags))
    assert 0 < gpt.load_checkpoint(f"out/{name}.npz")[1]["step"] < 20
    assert "was begun with" in outcome(module.main, "--resume", "--seed=7", *["--dpo"] * (name == "dpo"))
    outcome(*go_on)
    whole, parts = (gpt.load_checkpoint(f"out/{name}{x}.npz") for x in (".prev", ""))  # a fresh run keeps the last
    tree.map(np.testing.assert_array_equal, whole[0], parts[0])
    assert parts[1]["step"] == whole[1]["step"] == whole[1]["config"]["max_steps"]
    whole, parts = ([row[:2] for row in cells(f"out/{log}{x}.csv")] for x in (".prev", ""))
    assert parts == whole


PAIR = b'{"text": "a", "instruction": "q", "response": "a"}\n'
BAD_FILES = {
    "empty": b"", "blank": b"\n \n", "binary": b"a\0b", "utf16": "hi".encode("utf-16"), "short": b"a",
    "none.jsonl": b"{}", "list.jsonl": b"[]", "number.jsonl": b"3", "null.jsonl": b"null", "cut.jsonl": PAIR[:20],
    "second.jsonl": PAIR + b'{"text": 3}', "cut.json": b"[" + PAIR,
    "types.jsonl": b'{"text": 3, "instruction": 3, "response": 3}', "deep.jsonl": b"[" * 100_000,
    "blank.jsonl": b'{"instruction": "q", "response": " "}', "list.json": b"[" + PAIR + b", 3]",
    "roles.jsonl": b'{"messages": [{"role": "king", "content": "a"}, {"role": "assistant", "content": "a"}]}',
    "messages.jsonl": b'{"messages": 3}', "content.jsonl": b'{"messages": [{"role": "user"}]}',
    "bad.gz": b"no", "cut.gz": gzip.compress(b"text" * 99)[:20], "bad.bz2": b"no", "cut.bz2": bz2.compress(b"a")[:20],
    "cut.npz": b"PK\3\4" + bytes(99), "new\nline": b"", "space ": b"", "missing": None, "folder": None, "no/one": None}
MESSAGES = {
    "prepare missing": "missing: No such file", "prepare empty": "empty: empty", "prepare binary": "binary:1: not text",
    "prepare utf16": "utf16:1: UTF-16", "prepare second.jsonl": "second.jsonl:2: not a JSON object",
    "prepare in/a.txt --vocab_size=3": "--vocab_size 3: must be at least 259", "prepare short": "too little text",
    "gpt --n_layr 6": "did you mean --n_layer?", "gpt --n_embd=30": "multiple of 2 x n_head",
    "gpt --learning_rate=nan": "--learning_rate nan: must be", "gpt --block_size=5000": "5001 needed",
    "gpt --data_dir=odd": "odd length", "gpt --data_dir=foreign": "not a tokenizer",
    "gpt --data_dir=beyond": "beyond the vocabulary", "gpt --init=in/a.txt": "in/a.txt: not a whole checkpoint",
    "gpt --init=out/base.npz --n_layer=2": "was begun with 1", "gpt --resume --out_dir=nowhere": "no such checkpoint",
    "gpt --init=out/base.npz --data_dir=other": "another vocabulary", "sft second.jsonl": "second.jsonl:2: ",
    "sft list.json": "list.json: record 2: ", "sft --dpo=pair.jsonl": "pair.jsonl:1: needs",
    "chat none.npz": "none.npz: no such checkpoint", "chat --top_p=2": "--top_p 2.0: must be from 0 to 1"}


def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_bad_input_gets_one_line_and_changes_nothing(printed):
    """Every bad file in every place where a file can be named, and every number out of its range."""
    for name, content in BAD_FILES.items():
        if content is not None:
            Path(name).write_bytes(content)
    Path("folder").mkdir()
    Path("pair.jsonl").write_bytes(PAIR)
    for name in ("odd/train.bin", "foreign/tokenizer.json", "beyond/train.bin"):
        shutil.copytree("data", Path(name).parent)
        Path(name).write_bytes({"odd/train.bin": b"abc", "beyond/train.bin": b"\xff" * 200}.get(name, b"{}"))
    outcome(prepare.main, "in", "--vocab_size=270", "--out_dir=other")
    inputs = [(sys.modules[program], words, message) for (program, *words), message in
              ((command.split(), message) for command, message in MESSAGES.items())]
    for name in BAD_FILES:
        inputs += [(sft, [name], ""), (sft, [f"--dpo={name}"], ""), (sft, ["pair.jsonl", f"--eval={name}"], ""),
                   (chat, [name, "--prompt=a"], ""), (gpt, [f"--init={name}"], ""), (gpt, [f"--data_dir={name}"], "")]
        inputs += [(prepare, [name], "")] if not name.endswith(".json") else []  # as plain text they would do
    for module, settings in [(prepare, prepare.Settings), (gpt, gpt.Config), (sft, sft.Config), (chat, chat.Config)]:
        numbers = [f.name for f in dataclasses.fields(settings) if f.type in (int, float) and f.metadata]
        inputs += [(module, [f"--{n}={value}"], n) for n in numbers for value in ("-1", "x", "", "nan", "1e400")]
    before = contents()
    for module, argv, message in inputs:
        said = outcome(module.main, *argv)
        assert re.match(f"error: .*{re.escape(message)}", said), (argv, said)
    for flags, platform, message in [([], "none", "none.*requirements.txt.*JAX_PLATFORMS=cpu"),
                                     (["--coordinator=here"], "cpu", "--coordinator here: HOST:PORT")]:
        script = subprocess.run([sys.executable, gpt.__file__, *flags], env=os.environ | {"JAX_PLATFORMS": platform},
                                capture_output=True, text=True)
        assert re.fullmatch(f"error: .*{message}.*\n", script.stderr) and script.returncode == 2
    assert before == contents() and len(inputs) > 400


def flip(rounds):
    """Flip a bit of a checkpoint or cut it off: it is refused, or all of its arrays are as they were."""
    outcome(gpt.main, *TINY, "--out_dir=flipped", "--max_steps=1")
    whole, state = Path("flipped/base.npz").read_bytes(), gpt.load_checkpoint("flipped/base.npz")[0]
    refused = 0
    for i, place in enumerate(RNG.integers(len(whole), size=rounds)):
        flipped = whole[place] ^ 1 << i % 8
        rest = bytes([flipped]) + whole[place + 1:] if i % 2 else b""
        Path("damaged.npz").write_bytes(whole[:place] + rest)
        try:
            tree.map(np.testing.assert_array_equal, gpt.load_checkpoint("damaged.npz")[0], state)
        except InputError:
            refused += 1
    print(f"{rounds} damaged checkpoints: {refused} refused, {rounds - refused} loaded whole, none wrong")


def test_a_damaged_checkpoint_is_refused_or_whole(printed):
    flip(100)
    state, about, *_ = gpt.load_checkpoint("out/base.npz")
    with np.load("out/base.npz") as file:
        arrays = dict(file)
    gain = state["params"]["norm"]
    for wrong in (gain * np.float32(np.nan), gain[1:], gain.astype(np.float64)):
        np.savez("damaged.npz", **arrays | {"params.norm": wrong})
        with pytest.raises(InputError, match="damaged, params.norm"):
            gpt.load_checkpoint("damaged.npz")
    gain[0] = np.inf
    with pytest.raises(InputError, match="not written"):
        gpt.save_checkpoint("new.npz", state, about)
    assert not Path("new.npz").exists()


def kill(rounds):
    """Kill -9 a run, every other time while it trains, and resume it: in the end the bits of a run left alone."""
    run = [sys.executable, gpt.__file__, *TINY, "--max_steps=300", "--save_every=1", "--eval_every=7", "--out_dir"]
    subprocess.run([*run, "whole"], check=True, capture_output=True)
    killed, finished, steps, rng = 0, 0, set(), np.random.default_rng()
    rows = lambda: len(cells("parts/log.csv")) if os.path.exists("parts/log.csv") else 0
    while killed < rounds or not finished:
        resume = ["--resume"] * os.path.exists("parts/base.npz")
        if resume:
            steps.add(gpt.load_checkpoint("parts/base.npz")[1]["step"])  # whole, whenever the power fails
        before, process = rows(), subprocess.Popen([*run, "parts", *resume], stdout=subprocess.DEVNULL)
        while killed % 2 and process.poll() is None and rows() == before:
            time.sleep(0.01)
        try:
            assert process.wait(timeout=rng.uniform(0, 1 if killed % 2 else 5) if killed < rounds else None) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            continue
        finished += 1
        tree.map(np.testing.assert_array_equal, *(gpt.load_checkpoint(f"{d}/base.npz")[0] for d in ("whole", "parts")))
        whole, parts = ([row[:4] for row in cells(f"{d}/log.csv")] for d in ("whole", "parts"))
        assert whole == parts
        shutil.rmtree("parts")
    print(f"{killed} kills, resumed from {len(steps)} different steps; {finished} runs finished, each to the same bits")


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(printed):
    kill(2)


def test_two_processes_train_as_one_and_fall_together(printed):
    """On loopback, with split parameters; one is killed, the other ends at once, and all resume to the same bits."""
    flags = [*TINY, "--max_steps=60", "--log_every=1", "--save_every=5", "--learning_rate=1e-3", "--eval_every=30"]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}

    def start(out_dir, *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        run = [sys.executable, gpt.__file__, *flags, "--shard_params", f"--out_dir={out_dir}", *more,
               f"--coordinator={address}", "--num_processes=2"]
        return [subprocess.Popen([*run, f"--process_id={i}"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                 text=True) for i in (0, 1)]

    ends = lambda processes: [(p.communicate(timeout=150)[1], p.returncode) for p in processes]
    outcome(gpt.main, *flags, "--out_dir=one")
    assert [code for _, code in ends(start("two"))] == [0, 0]
    losses = [np.array([row[1] for row in cells(f"{d}/log.csv")[1:]], float) for d in ("one", "two")]
    assert len(losses[1]) == 60 and np.abs(losses[0] - losses[1])[:50].max() < 1e-4
    first, second = start("halves")
    while first.poll() is None and (not os.path.exists("halves/log.csv") or len(cells("halves/log.csv")) < 10):
        time.sleep(0.01)
    second.kill()
    notices = "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters
    if not notices:  # with the jax of Macs the other can hang
        first.kill()
    (message, code), _ = ends([first, second])
    ours, jaxs = "error: a process of this run died.*--resume", "another task died"  # whoever notices first
    assert not notices or code == 2 and re.search(ours, message) or code < 0 and re.search(jaxs, message), message
    step = gpt.load_checkpoint("halves/base.npz")[1]["step"]
    shutil.copytree("halves", "alone")
    assert 5 <= step < 60 and [code for _, code in ends(start("halves", "--resume"))] == [0, 0]
    tree.map(np.testing.assert_array_equal, *(gpt.load_checkpoint(f"{d}/base.npz")[0] for d in ("two", "halves")))
    outcome(gpt.main, "--resume", "--out_dir=alone")  # a run of two processes goes on in one
    assert abs(float(cells("alone/log.csv")[step + 1][1]) - losses[1][step]) < 1e-4


def test_a_loss_that_is_not_finite_and_a_folder_that_vanishes_stop_the_run(printed, monkeypatch):
    wild = [*TINY, "--out_dir=wild", "--learning_rate=1e17", "--grad_clip=0", "--warmup=0", "--save_every=1"]
    assert re.match("error: .*smaller --learning_rate", outcome(gpt.main, *wild))
    gpt.load_checkpoint("wild/base.npz")  # finite still
    make = gpt.random_batch

    def vanish(*args):
        if args[-1] == 3:
            shutil.rmtree("gone")
        return make(*args)

    monkeypatch.setattr(gpt, "random_batch", vanish)
    assert re.match("error: gone.log.csv: No such file", outcome(gpt.main, *TINY, "--out_dir=gone", "--eval_every=0"))


@pytest.mark.skipif(os.name == "nt", reason="needs ulimit")
def test_a_full_disk_is_named_and_leaves_earlier_files_as_they_were(printed):
    before, full = contents(), ["sh", "-c", 'ulimit -f 16; exec "$@"', "sh"]  # no file may grow beyond 16 blocks
    run = subprocess.run([*full, sys.executable, gpt.__file__, *TINY], capture_output=True, text=True)
    assert run.returncode == 2 and re.fullmatch("error: .*File too large.*\n", run.stderr) and before == contents()


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
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        prepare_texts()
        {"kill": kill, "flip": flip}[sys.argv[1]](int(sys.argv[2]))
