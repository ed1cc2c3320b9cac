"""Why the code is right. Read it as a second explanation: the model once more in plain NumPy, its backward pass derived
by hand; then what must hold for attention, optimiser, generation, tokenizer, masks, checkpoints and bad input.

    python -m pytest -q              # on a Mac this runs every check on the Apple GPU
"""
import bz2
import contextlib
import dataclasses
import functools
import gzip
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import chat
import gpt
import jax
import jax.numpy as jnp
import numpy as np
import prepare
import pytest
import sft
from prepare import ASSISTANT, END, SPECIAL, USER, InputError, Tokenizer

pytestmark = pytest.mark.filterwarnings("error")  # deprecations too
jax.config.update("jax_numpy_rank_promotion", "raise")

B, T, L, H, D, V = 5, 7, 2, 3, 22, 13  # sizes that cannot be mistaken for one another
MODEL = gpt.Model(n_layer=L, n_head=H, n_embd=H * D, block_size=T, vocab_size=V)
CFG = gpt.Config(learning_rate=0.01, max_steps=100, weight_decay=0.1, grad_clip=1.0)
tree = jax.tree


def example(seed=0, model=MODEL):
    """Parameters far from their start (gains too), and a batch with uneven weights."""
    rng = np.random.default_rng(seed)
    params = tree.map(lambda p: (p + rng.normal(0, 0.2, p.shape)).astype(np.float32), gpt.init_params(model, seed))
    tokens = rng.integers(0, model.vocab_size, (B, model.block_size + 1)).astype(np.int32)
    return params, (tokens[:, :-1], tokens[:, 1:], rng.integers(0, 3, (B, model.block_size)).astype(np.float32))


def gradient(params, batch, model=MODEL):
    return jax.jit(jax.grad(lambda p: gpt.loss(p, batch, None, model)[0]))(params)


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


def double(params):
    return tree.map(lambda p: p.astype(np.float64), params)


def test_the_twins_gradient_agrees_with_finite_differences():
    params, (x, y, w) = example()
    params = double(params)
    g = twin(params, x[0], y[0], w[0])[2]
    for p, dp in zip(tree.leaves(params), tree.leaves(g)):
        i = np.unravel_index(np.abs(dp).argmax(), dp.shape)
        old, ends = p[i], []
        for p[i] in (old - 1e-5, old + 1e-5):
            ends.append(twin(params, x[0], y[0], w[0])[1])
        p[i] = old
        assert (ends[1] - ends[0]) / 2e-5 == pytest.approx(dp[i], rel=1e-6)


@pytest.mark.parametrize("queries", [128, 3])  # attention in one piece, and in three
def test_logits_and_every_gradient_equal_the_twins(queries, monkeypatch):
    monkeypatch.setattr(gpt, "QUERIES", queries)
    params, batch = example()
    twins = [twin(double(params), *row) for row in zip(*batch)]
    logits = jax.vmap(lambda x: gpt.forward(params, x, MODEL)[0])(batch[0])
    np.testing.assert_allclose(logits, np.stack([t[0] for t in twins]), rtol=1e-4, atol=1e-4)
    total = tree.map(lambda *gradients: sum(gradients), *[t[2] for t in twins])
    assert_close(gradient(params, batch), total, 1e-4)


# ---------------------------------------------------------------- the model


def test_changing_a_token_changes_no_logits_before_it():
    params, (x, _, _) = example()
    f = jax.jit(lambda tokens: gpt.forward(params, tokens, MODEL)[0])
    for t in range(T):
        changed = x[0].copy()
        changed[t] = (changed[t] + 1) % V
        same = np.abs(f(changed) - f(x[0])).max(-1) == 0
        assert same[:t].all() and not same[t:].any()


def test_a_batch_under_vmap_is_a_loop_over_its_rows():
    params, batch = example()
    whole = gpt.loss(params, batch, None, MODEL)
    parts = [gpt.loss(params, [a[i:i + 1] for a in batch], None, MODEL) for i in range(B)]
    np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-5)


def test_bfloat16_stays_near_float32():
    params, batch = example()
    exact, rough = (float(gpt.loss(params, batch, None, dataclasses.replace(MODEL, dtype=dtype))[0])
                    for dtype in ("float32", "bfloat16"))
    assert rough == pytest.approx(exact, rel=0.01) and rough != exact


def test_dropout_depends_on_the_key_alone_and_is_off_in_evaluation():
    params, batch = example()
    model = dataclasses.replace(MODEL, dropout=0.5)
    a, b, c = (gpt.loss(params, batch, np.array([0, n], np.uint32), model)[0] for n in (1, 1, 2))
    assert a == b != c
    logits = [gpt.forward(params, batch[0][0], m)[0] for m in (model, MODEL)]
    np.testing.assert_array_equal(*logits)


# ---------------------------------------------------------------- optimiser and step


def test_adam_equals_its_closed_form_with_decay_and_clipping():
    rng = np.random.default_rng(0)
    p = {"matrix": rng.normal(size=(3, 5)).astype(np.float32), "gain": rng.normal(size=5).astype(np.float32)}
    grads = [tree.map(lambda x: (rng.normal(size=x.shape) * 10.0 ** (i - 2)).astype(np.float32), p) for i in range(5)]
    state, expected, clipped = gpt.new_state(p), double(p), []
    for t, g in enumerate(grads):
        state = gpt.adam(state, g, gpt.rates(t, CFG), CFG)
        length = np.sqrt(sum((x**2).sum() for x in g.values()))
        clipped.append(tree.map(lambda x: x * min(1, 1 / (length + 1e-6)), double(g)))
        for name in p:
            mean = sum(0.1 * 0.9 ** (t - i) * c[name] for i, c in enumerate(clipped)) / (1 - 0.9 ** (t + 1))
            square = sum(0.01 * 0.99 ** (t - i) * c[name] ** 2 for i, c in enumerate(clipped)) / (1 - 0.99 ** (t + 1))
            decay = 0.1 * expected[name] * (name == "matrix")
            expected[name] = expected[name] - gpt.learning_rate(t, CFG) * (mean / (np.sqrt(square) + 1e-8) + decay)
    assert_close(state["params"], expected, 1e-5)


def test_the_learning_rate_warms_up_and_falls_to_a_twentieth():
    cfg = gpt.Config(learning_rate=1.0, warmup=10, max_steps=110)
    rate = [gpt.learning_rate(step, cfg) for step in range(120)]
    assert rate[0] == pytest.approx(1 / 11) and rate[10] == 1 and rate[60] == pytest.approx(0.525)
    assert rate[110] == rate[119] == pytest.approx(0.05)
    assert gpt.learning_rate(10, dataclasses.replace(cfg, warmup=10 / 110)) == 1


def one_step(params, batch, n_micro):
    """The state after one step with the batch in n_micro equal parts, each over as many devices as divide it."""
    step = gpt.make_step(functools.partial(gpt.loss, model=MODEL), CFG)
    parts = [tuple(np.split(a, n_micro)[i] for a in batch) for i in range(n_micro)]
    whole, split = gpt.placements(len(parts[0][0]))
    batches = [(jax.device_put(part, split), np.zeros(2, np.uint32)) for part in parts]
    return jax.device_get(step(jax.device_put(gpt.new_state(params), whole), batches, gpt.rates(0, CFG)))


def test_the_step_is_the_same_however_the_batch_is_split():
    params, _ = example()
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (12, T + 1)).astype(np.int32)
    batch = tokens[:, :-1], tokens[:, 1:], (rng.random((12, T)) < np.linspace(0, 1, 12)[:, None]).astype(np.float32)
    state, loss = one_step(params, batch, 1)  # 4 devices
    total, count = gpt.loss(params, batch, None, MODEL)
    assert loss == pytest.approx(float(total / count), rel=1e-5)
    for n_micro in (2, 3, 6):  # 3, 4 and 2 devices, parts with unequal weights
        other, other_loss = one_step(params, batch, n_micro)
        assert other_loss == pytest.approx(float(loss), rel=1e-5)
        assert_close(other["m"], state["m"], 1e-4)


def test_a_batch_without_weights_has_loss_zero_and_moves_nothing_wild():
    params, (x, y, w) = example()
    state, loss = one_step(params, (x, y, w * 0), 1)
    assert loss == 0 and all(np.isfinite(a).all() for a in tree.leaves(state))


def test_one_batch_can_be_learned_by_heart():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (4, T + 1)).astype(np.int32)
    tokens[:, 0] = range(4)  # rows that begin alike could not be told apart
    batch = tokens[:, :-1], tokens[:, 1:], np.ones((4, T), np.float32)
    step = gpt.make_step(functools.partial(gpt.loss, model=MODEL), CFG)
    state = gpt.new_state(gpt.init_params(MODEL))
    for t in range(100):
        state, loss = step(state, [(batch, np.zeros(2, np.uint32))], gpt.rates(t, CFG))
        loss = float(loss)
        assert t or abs(loss - np.log(V)) < 0.2  # a new model knows nothing
    assert loss < 0.05


# ---------------------------------------------------------------- generation


def greedy(i, logits, history):
    return int(logits[1:].argmax()) + 1  # never END, so that it goes on


def test_generation_with_the_cache_is_the_argmax_of_the_full_pass_past_block_size_too():
    params, (x, _, _) = example()
    prompts = [x[i, :n].tolist() for i, n in enumerate([1, 3, T, 2, 5])]
    made = np.array(list(gpt.make_generator(MODEL)(params, prompts, greedy, 3 * T))).T
    for prompt, new in zip(prompts, made.tolist()):
        window = list(prompt)
        for token in new:
            window = window if len(window) <= T else window[-(T // 2 + 1):]
            assert token == greedy(0, np.array(gpt.forward(params, np.array(window), MODEL)[0])[-1], None)
            window.append(token)


def test_sampling_obeys_temperature_top_k_top_p_and_penalty():
    logits, rng = np.log([0.5, 0.3, 0.15, 0.05]), np.random.default_rng(0)
    draw = lambda history=(), **how: Counter(gpt.sample(logits, history, rng, **how) for _ in range(4000))
    assert set(draw(temperature=0)) == {0} and set(draw(temperature=1, top_k=2)) == {0, 1}
    assert set(draw(temperature=1, top_p=0.79)) == {0, 1} and set(draw(temperature=1, top_p=0.81)) == {0, 1, 2}
    assert draw(temperature=1)[1] / 4000 == pytest.approx(0.3, abs=0.03)
    assert gpt.sample(logits, [0], rng, repetition_penalty=2.0) == 1
    assert draw(temperature=1, top_p=0) == Counter({0: 4000})
    seeded = [gpt.sample(np.zeros(99), [], np.random.default_rng(3), temperature=1) for _ in range(2)]
    assert seeded[0] == seeded[1]


# ---------------------------------------------------------------- Metal

METAL_OPS = set("""dot_general add subtract multiply divide negate maximum minimum exponential log tanh rsqrt sqrt
    reduce broadcast_in_dim reshape transpose slice concatenate pad constant iota compare and or not select convert
    return""".split())


def not_for_metal(f, *args):
    """Operations and types of f, lowered for Metal, outside the safe subset -> {name: the first line that has it}."""
    lines = jax.jit(f).trace(*args).lower(lowering_platforms=("METAL",)).as_text().splitlines()
    found = [(name, f"line {n}: {line.strip()}") for n, line in enumerate(lines, 1)
             for name in re.findall(r"stablehlo\.(\w+)", line) if name not in METAL_OPS]
    found += [(name, f"line {n}: {line.strip()}") for n, line in enumerate(lines, 1)
              for name in re.findall(r"[x<](f64|f16|bf16|i64|complex<)\b", line.replace("array<i64", ""))]
    return dict(reversed(found))


def test_the_steps_lower_to_what_metal_can_do(monkeypatch):
    monkeypatch.setattr(gpt, "on_metal", lambda: True)
    params, batch = example()
    step, key = gpt.make_step(functools.partial(gpt.loss, model=MODEL), CFG), np.zeros(2, np.uint32)
    assert not not_for_metal(lambda s, b, r: step(s, [(b, key)], r), gpt.new_state(params), batch, gpt.rates(0, CFG))
    assert not not_for_metal(lambda p, b: gpt.loss(p, b, None, MODEL), params, batch)
    prefill = lambda p, tokens, at: gpt.forward(p, tokens, MODEL, at=at)
    cache = prefill(params, batch[0][0], np.array(3))[1]
    assert not not_for_metal(prefill, params, batch[0][0], np.array(3, np.int32))
    assert not not_for_metal(lambda p, token, at, cache: gpt.forward(p, token, MODEL, at=at, cache=cache),
                             params, batch[0][0][:1], np.array(3, np.int32), cache)
    monkeypatch.setattr(gpt, "on_metal", lambda: False)  # a gather and its gradient are found
    found = not_for_metal(jax.grad(lambda p: gpt.loss(p, batch, None, MODEL)[0]), params)
    assert {"gather", "scatter"} <= set(found) and found["scatter"].startswith("line ")
    assert "bf16" in not_for_metal(lambda x: x.astype(jnp.bfloat16), np.ones(3, np.float32))


# ---------------------------------------------------------------- tokenizer



def naive_bpe(words, vocab_size):
    """The definition: count all pairs anew before each merge; the most frequent one, of equals the smallest."""
    words, merges = [([b + prepare.FIRST_BYTE for b in w.encode()], n) for w, n in words.items()], []
    while prepare.FIRST_MERGE + len(merges) < vocab_size:
        count = Counter()
        for ids, n in words:
            for pair in zip(ids, ids[1:]):
                count[pair] += n
        best = min(count, key=lambda p: (-count[p], p), default=None)
        if not best or count[best] < 2:
            break
        words = [(prepare.merge(ids, best, prepare.FIRST_MERGE + len(merges)), n) for ids, n in words]
        merges.append(best)
    return merges


def tokenizer_of(text, vocab_size=320):
    return Tokenizer(prepare.train_bpe(Counter(prepare.WORD.findall(text)), vocab_size))


TOKENIZER = tokenizer_of("the cat sat on the mat, the hat; user and assistant end 1234 naïve façade " * 3)
PIECES = [*SPECIAL, "<|", "|>", "user", " the", "  ", "\n", "é", "\U0001f600", "12345", "'ll", "\ud800", "\0", ""]


def texts(n=400, pieces=PIECES):
    """Random texts of fragments that nest and split the special tokens, and of any code points."""
    rng = np.random.default_rng(0)
    for i in range(n):
        parts = [pieces[j] if j < len(pieces) else chr(rng.integers(0x110000 if i % 2 else 0x250))
                 for j in rng.integers(0, 2 * len(pieces), rng.integers(0, 20))]
        yield "".join(parts)


def test_the_wikipedia_example_of_byte_pair_encoding():
    t = Tokenizer(prepare.train_bpe(Counter(["aaabdaaabac"]), 262))
    assert [t.bytes[i] for i in t.encode("aaabdaaabac")] == [b"aaab", b"d", b"aaab", b"a", b"c"]


def test_fast_training_learns_the_merges_of_the_naive_definition():
    for seed in range(50):
        text = "".join(np.random.default_rng(seed).choice(list("aaabbc  é"), 200))
        words = Counter(prepare.WORD.findall(text))
        assert prepare.train_bpe(words, 290) == naive_bpe(words, 290)


def test_any_text_survives_encoding_and_none_becomes_a_special_token():
    for text in texts():
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == text.encode("utf-8", "replace").decode()
        assert not set(ids) & {END, USER, ASSISTANT}


def test_any_ids_can_be_decoded_and_streaming_them_gives_the_same_text():
    rng = np.random.default_rng(0)
    for n in range(200):
        ids = rng.integers(0, TOKENIZER.size, n).tolist()
        assert "".join(TOKENIZER.stream(ids)) == TOKENIZER.decode(ids)


def test_hostile_text_takes_linear_time():
    noise = np.random.default_rng(0).bytes(1 << 20).decode("latin-1")
    for text in ("a" * (1 << 20), " " * (1 << 20), "\n " * (1 << 19), noise):
        started = time.time()
        tokenizer_of(text, 270)
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
        assert time.time() - started < 60  # quadratic time would be hours


def test_tokenizer_json_is_enough_to_rebuild_it():
    again = Tokenizer.from_json(TOKENIZER.to_json(), "tokenizer.json")
    assert again.merges == TOKENIZER.merges and '" the"' in TOKENIZER.to_json()
    for wrong in ("", "[]", "{}", '{"merges": [[900, 4, ""]], "special": []}'):
        with pytest.raises(InputError, match="not a tokenizer"):
            Tokenizer.from_json(wrong, "x.json")


# ---------------------------------------------------------------- fine-tuning

TURNS = ["the cat?", "a mat", "and?", "the hat"]
CHAT_MODEL = gpt.Model(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=TOKENIZER.size)


def test_answers_and_their_ends_are_trained_and_nothing_else():
    ids, trained = sft.render(TURNS, TOKENIZER)
    q1, a1, q2, a2 = (TOKENIZER.encode(f" {t}") for t in TURNS)
    assert ids == [USER, *q1, ASSISTANT, *a1, END, USER, *q2, ASSISTANT, *a2, END]
    x, y, w = sft.shift(ids, trained, 64)
    assert y[w == 1].tolist() == [*a1, END, *a2, END]  # both turns; not what follows an end, not the padding
    batch = x[None], y[None], w[None].astype(np.float32)

    def from_logits(extra):  # the loss as a function of what is added to the logits
        forward = gpt.forward
        try:
            gpt.forward = lambda *a: (forward(*a)[0] + extra, None)
            return gpt.loss(params, batch, None, CHAT_MODEL)[0]
        finally:
            gpt.forward = forward

    params = gpt.init_params(CHAT_MODEL)
    moved = np.abs(jax.grad(from_logits)(np.zeros((64, TOKENIZER.size), np.float32))).max(-1) > 0
    assert y[moved].tolist() == [*a1, END, *a2, END]


def test_other_targets_rows_and_padding_change_nothing():
    params = gpt.init_params(CHAT_MODEL)
    x, y, w = sft.shift(*sft.render(TURNS, TOKENIZER), 64)
    losses = lambda x, y: np.asarray(jax.jit(lambda p: jax.grad(
        lambda p: gpt.loss(p, (x[None], y[None], w[None].astype(np.float32)), None, CHAT_MODEL)[0])(p))(params)["norm"])
    padding = np.arange(64) >= len(sft.render(TURNS, TOKENIZER)[0]) - 1
    assert padding.any()
    np.testing.assert_array_equal(losses(x, y), losses(x, np.where(w == 0, 7, y)))
    np.testing.assert_array_equal(losses(x, y), losses(np.where(padding, 7, x), y))


def test_the_prompt_of_chat_is_the_beginning_of_the_training_example():
    for question in texts():
        prompt = chat.prompt_ids([question], TOKENIZER, 256)
        ids, trained = sft.render([question, "a mat"], TOKENIZER)
        assert prompt == ids[:len(prompt)] and trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_an_example_of_the_contexts_length_is_kept_and_one_token_more_left_out(tmp_path, capsys):
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"instruction": "the cat?", "response": "a mat"}] * 2))
    length = len(sft.render(["the cat?", "a mat"], TOKENIZER)[0])
    assert len(sft.read_examples([pairs], TOKENIZER, length)) == 2 and not capsys.readouterr().out
    with pytest.raises(InputError, match="no example fits"):
        sft.read_examples([pairs], TOKENIZER, length - 1)
    assert "left out: 2 of 2" in capsys.readouterr().out


def test_a_long_conversation_loses_whole_turns_from_its_beginning():
    prompt = chat.prompt_ids(["the cat " * 5, "a mat"] * 20 + ["the hat?"], TOKENIZER, 64)
    assert len(prompt) + 24 <= 64 and prompt[0] == USER and prompt.count(USER) == prompt.count(END) + 1
    with pytest.raises(InputError, match="context"):
        chat.prompt_ids(["the cat " * 50], TOKENIZER, 64)


def test_the_formats_of_alpaca_dolly_and_chats_are_read():
    turns = lambda record: sft.turns_of(record, "x:1")
    for more in ({"response": "a"}, {"input": "", "output": "a"}, {"context": "", "response": "a", "category": "qa"}):
        assert turns({"instruction": "q", **more}) == ["q", "a"]
    for more in ({"input": "i", "output": "a"}, {"context": "i", "response": "a"}):
        assert turns({"instruction": "q", **more}) == ["q\n\ni", "a"]
    message = lambda *roles: {"messages": [{"role": r, "content": r[0]} for r in roles]}
    assert turns(message("system", "user", "assistant")) == ["s\n\nu", "a"]
    half = {"instruction": "q"}
    for wrong in ([], {}, half, {**half, "response": 3}, {**half, "response": " "}, {"messages": 1}, message("user"),
                  message("assistant", "user"), message("user", "user"), message("user", "tool"),
                  message("user", "assistant", "user")):
        with pytest.raises(InputError, match="x:1"):
            turns(wrong)


def test_every_example_is_seen_once_an_epoch_and_old_text_is_replayed():
    rows = np.arange(21).reshape(7, 3, 1).repeat(4, axis=2)
    old = np.arange(99, dtype=np.uint16)
    seen = [tuple(r) for n in range(7) for r in sft.mixed_batch(rows, old, 4, 0.25, 4, 0, n)[0][:3]]
    assert sorted(seen) == sorted([tuple(r[0]) for r in rows] * 3)
    x, y, w = sft.mixed_batch(rows, old, 4, 0.25, 4, 0, 5)
    assert (x[3] + 1 == y[3]).all() and (w[3] == 1).all()


# ---------------------------------------------------------------- preferences


def test_dpo_starts_at_ln_2_and_its_gradient_is_half_beta_of_the_difference():
    params, rng = gpt.init_params(CHAT_MODEL), np.random.default_rng(0)
    pair = [sft.shift(*sft.render(["the cat?", answer], TOKENIZER), 64) for answer in ("a mat", "the hat; the hat")]
    rows = np.array([pair, pair])
    reference = sft.log_probs_of(params, rows, CHAT_MODEL)
    x, y, w = rows.transpose(2, 0, 1, 3)
    batch = x, y, w.astype(np.float32), reference
    loss = lambda p, batch, anchor=0.0: sft.dpo_loss(p, batch, None, CHAT_MODEL, 0.1, anchor)[0] / 2
    (value, grad), logp = jax.jit(jax.value_and_grad(loss))(params, batch), jax.jit(functools.partial(
        sft.log_probs, model=CHAT_MODEL))
    assert value == pytest.approx(np.log(2), abs=1e-5)
    chosen, rejected = (jax.grad(lambda p: logp(p, *(a[:1] for a in side))[0])(params)
                        for side in zip(*[(a[:, 0], a[:, 1]) for a in batch[:3]]))
    assert_close(grad, tree.map(lambda c, r: -0.05 * (c - r), chosen, rejected), 1e-3)
    moved = tree.map(lambda p: p + rng.normal(0, 0.05, p.shape).astype(np.float32), params)
    swapped = [a[:, ::-1] for a in batch]
    margin = lambda batch: np.log(np.expm1(float(loss(moved, batch))))  # of -log sigmoid(m): log(e^L - 1) = -m
    assert margin(batch) == pytest.approx(-margin(swapped), abs=1e-4) and abs(margin(batch)) > 1e-3
    assert loss(params, batch, 1.0) - loss(params, batch) == pytest.approx(-reference[0, 0] / w[0, 0].sum(), rel=1e-4)


# ---------------------------------------------------------------- the programs

TEXT = "the cat sat on the mat and the rat ran from the cat to the hat\n" * 40
SMALL = ("--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4"
         " --eval_every=3 --log_every=1 --save_every=4").split()


@pytest.fixture()
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT)
    prepare.main(["my.txt", "--vocab_size=300"])
    return tmp_path


def outcome(main, *argv):
    """What a script prints; for an error its one line, after checking the exit status."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            prepare.run(main, list(map(str, argv)))
        except SystemExit as e:
            assert e.code == (2 if err.getvalue() else 130) and err.getvalue().count("\n") <= 1
    return err.getvalue() or out.getvalue()


def interrupted(patch, module, function, at):
    """Let module.function press Ctrl-C when it makes batch number `at` (its last argument)."""
    make = getattr(module, function)

    def press_ctrl_c(*args):
        if args[-1] == at:
            signal.raise_signal(signal.SIGINT)
        return make(*args)

    patch.setattr(module, function, press_ctrl_c)


def assert_same_checkpoint(a, b):
    (state, about, *_), (other, other_about, *_) = gpt.load_checkpoint(a), gpt.load_checkpoint(b)
    assert about["step"] == other_about["step"]
    for x, y in zip(tree.leaves(state), tree.leaves(other)):
        np.testing.assert_array_equal(x, y)


def test_an_interrupted_run_is_saved_and_resumes_to_the_same_bits(folder, monkeypatch):
    flags = [*SMALL, "--max_steps=10", "--dropout=0.1", "--grad_accum=2"]
    outcome(gpt.main, *flags, "--out_dir=whole")
    with monkeypatch.context() as patch:
        interrupted(patch, gpt, "random_batch", 9)
        assert "interrupted at step" in outcome(gpt.main, *flags, "--out_dir=parts")
    assert 0 < gpt.load_checkpoint("parts/base.npz")[1]["step"] < 10
    outcome(gpt.main, "--out_dir=parts", "--resume", "--eval_every=5")
    assert_same_checkpoint("whole/base.npz", "parts/base.npz")
    losses = lambda d: [row.split(",")[:2] for row in (folder / d / "log.csv").read_text().splitlines()]
    assert losses("whole") == losses("parts") and len(losses("whole")) == 11
    assert "was begun with" in outcome(gpt.main, "--out_dir=parts", "--resume", "--n_layer=2")

    (folder / "pairs.json").write_text('[{"instruction": "q", "response": "a"}, {"instruction": "b", "response": "c"}]')
    flags = ["pairs.json", "--max_steps=8", "--batch_size=4"]
    outcome(sft.main, *flags, "--out_dir=whole")
    with monkeypatch.context() as patch:
        interrupted(patch, sft, "mixed_batch", 4)
        assert "python sft.py --resume" in outcome(sft.main, *flags, "--out_dir=parts")
    outcome(sft.main, "--out_dir=parts", "--resume")
    assert_same_checkpoint("whole/chat.npz", "parts/chat.npz")


def test_the_road_from_text_to_answers(folder):
    print_out = outcome(gpt.main, *SMALL[:-3], "--eval_every=50", "--block_size=48", "--n_embd=32", "--max_steps=100")
    assert "expected first loss ln" in print_out and "next: python sft.py" in print_out
    first = (folder / "out/log.csv").read_text().splitlines()[1].split(",")
    assert first[0] == "1" and abs(float(first[1]) - np.log(gpt.load_checkpoint("out/base.npz")[3].size)) < 0.2
    pairs = [{"instruction": f"where is the {a}?", "response": f"the {a} sat on the {b}"} for a, b in
             itertools.product(["cat", "rat"], ["mat"])] + [{"instruction": "hi " * 60, "response": "too long"}]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    flags = ["--max_steps=200", "--batch_size=8", "--learning_rate=0.004", "--eval_every=200"]
    print_out = outcome(sft.main, "pairs.json", *flags, "--eval=pairs.json")
    base, tuned = (gpt.load_checkpoint(f"out/{name}.npz")[0]["params"]["wte"] for name in ("base", "chat"))
    assert base.shape == tuned.shape and not np.allclose(base[[USER, ASSISTANT]], tuned[[USER, ASSISTANT]])
    log = [row.split(",") for row in (folder / "out/log_sft.csv").read_text().splitlines()]
    assert log[0][2] == "val_loss" and float(log[-1][2]) > 0  # forgetting is watched
    assert "left out: 1 of 3" in print_out and "of the answers end by themselves" in print_out
    assert "<|assistant|>[ the cat sat on the mat<|end|>]" in outcome(sft.main, "pairs.json", "--show=1")
    ask = lambda text, *more: subprocess.run([sys.executable, chat.__file__, *more], input=text, capture_output=True,
                                             text=True)
    answer = ask("where is the cat?\nwhere is the rat?\n")
    assert answer.stdout == "the cat sat on the mat\nthe rat sat on the mat\n" and not answer.stderr
    too_long = ask("hi " * 60 + "\nwhere is the cat?\n")  # an error, and still a line for each line
    assert too_long.stdout == "\nthe cat sat on the mat\n" and "standard input:1: the question has" in too_long.stderr
    assert ask("", "out/base.npz", "--prompt=the cat").stdout.startswith("the cat")


PAIR = b'{"instruction": "q", "response": "a"}\n'
BAD_FILES = {
    "empty": b"", "blank": b"\n \n", "binary": b"a\0b", "utf16": "hi".encode("utf-16"), "short": b"a",
    "none.jsonl": b"{}", "list.jsonl": b"[]", "number.jsonl": b"3", "null.jsonl": b"null", "cut.jsonl": PAIR[:20],
    "second.jsonl": b'{"text": "a", "instruction": "q", "response": "a"}\n{"text": 3}\n', "cut.json": b"[" + PAIR,
    "types.jsonl": b'{"text": 3, "instruction": 3, "response": 3}', "deep.jsonl": b"[" * 100_000,
    "blank.jsonl": b'{"instruction": "q", "response": " "}', "list.json": b"[" + PAIR + b", 3]",
    "roles.jsonl": b'{"messages": [{"role": "king", "content": "a"}, {"role": "assistant", "content": "a"}]}',
    "messages.jsonl": b'{"messages": 3}', "content.jsonl": b'{"messages": [{"role": "user"}]}',
    "bad.gz": b"no", "cut.gz": gzip.compress(b"text" * 99)[:20], "bad.bz2": b"no", "cut.bz2": bz2.compress(b"a")[:20],
    "cut.npz": b"PK\3\4" + bytes(99), "new\nline": b"", "space ": b"", "missing": None, "folder": None, "no/one": None}
MESSAGES = [
    (prepare, "missing", "missing: No such file"), (prepare, "empty", "empty: empty"),
    (prepare, "binary", "binary:1: not text"),
    (prepare, "utf16", "utf16:1: UTF-16"), (prepare, "second.jsonl", "second.jsonl:2: not a JSON object"),
    (prepare, "my.txt --vocab_size=3", "--vocab_size 3: must be at least 259"), (prepare, "short", "too little text"),
    (gpt, "--n_layr 6", "did you mean --n_layer?"), (gpt, "--n_embd=30", "multiple of 2 x n_head"),
    (gpt, "--learning_rate=nan", "--learning_rate nan: must be"), (gpt, "--block_size=5000", "5001 needed"),
    (gpt, "--data_dir=odd", "odd length"), (gpt, "--data_dir=foreign", "not a tokenizer"),
    (gpt, "--data_dir=beyond", "beyond the vocabulary"), (gpt, "--init=my.txt", "my.txt: not a whole checkpoint"),
    (gpt, "--init=base.npz --n_layer=2", "was begun with 1"), (gpt, "--init=base.npz --data_dir=other", "vocabulary"),
    (gpt, "--resume --out_dir=nowhere", "no such checkpoint"),
    (sft, "second.jsonl --init=base.npz", "second.jsonl:2: "),
    (sft, "list.json --init=base.npz", "list.json: record 2"),
    (sft, "--dpo=pair.jsonl --init=base.npz", "pair.jsonl:1: needs"), (chat, "none.npz", "no such checkpoint"),
    (chat, "base.npz --top_p=2", "--top_p 2.0: must be from 0 to 1")]


def test_bad_input_gets_one_line_and_changes_nothing(folder):
    """Every bad file in every place where a file can be named, and every number out of its range."""
    for name, content in BAD_FILES.items():
        if content is not None:
            (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    (folder / "pair.jsonl").write_bytes(PAIR)
    for name, file, content in [("odd", "train.bin", b"abc"), ("foreign", "tokenizer.json", b"{}"),
                                ("beyond", "train.bin", b"\xff" * 200)]:
        shutil.copytree("data", name)
        (folder / name / file).write_bytes(content)
    outcome(gpt.main, *SMALL, "--max_steps=1")
    shutil.copy("out/base.npz", "base.npz")
    outcome(prepare.main, "my.txt", "--vocab_size=270", "--out_dir=other")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    inputs = [(module, words.split(), message) for module, words, message in MESSAGES]
    for name in BAD_FILES:
        inputs += [(sft, [name, "--init=base.npz"], ""), (sft, ["--init=base.npz", f"--dpo={name}"], ""),
                   (sft, ["pair.jsonl", "--init=base.npz", f"--eval={name}"], ""), (chat, [name, "--prompt=a"], ""),
                   (gpt, [f"--init={name}"], ""), (gpt, [f"--data_dir={name}"], "")]
        inputs += [(prepare, [name], "")] if not name.endswith(".json") else []  # as plain text they would do
    for module, settings in [(prepare, prepare.Settings), (gpt, gpt.Config), (sft, sft.Config), (chat, chat.Config)]:
        numbers = [f.name for f in dataclasses.fields(settings) if f.type in (int, float) and f.metadata]
        inputs += [(module, [f"--{n}={value}"], n) for n in numbers for value in ("-1", "x", "", "nan", "1e400")]
    for module, argv, message in inputs:
        said = outcome(module.main, *argv)
        assert re.match(f"error: .*{re.escape(message)}", said), (argv, said)
    assert len(inputs) > 400 and before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    script = subprocess.run([sys.executable, gpt.__file__, "--n_layr=6"], capture_output=True, text=True)
    assert script.returncode == 2 and script.stderr.count("\n") == 1 and "Traceback" not in script.stderr


def test_a_device_that_fails_gets_advice_instead_of_a_traceback(folder, monkeypatch):
    def fail(*args):
        raise RuntimeError("UNIMPLEMENTED: default_memory_space is not supported")

    monkeypatch.setattr(jax, "device_put", fail)
    assert re.match("error: .*UNIMPLEMENTED.*requirements.txt.*JAX_PLATFORMS=cpu", outcome(gpt.main, *SMALL))


def flip(rounds):
    """Flip a bit of a checkpoint or cut it off: it is refused, or all of its arrays are as they were."""
    outcome(gpt.main, *SMALL, "--max_steps=1")
    whole, rng, refused = Path("out/base.npz").read_bytes(), np.random.default_rng(0), 0
    expected = tree.leaves(gpt.load_checkpoint("out/base.npz")[0])
    for i in range(rounds):
        damaged = bytearray(whole)
        if i % 2:
            del damaged[rng.integers(len(whole)):]
        else:
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        Path("damaged.npz").write_bytes(damaged)
        try:
            for a, b in zip(tree.leaves(gpt.load_checkpoint("damaged.npz")[0]), expected):
                np.testing.assert_array_equal(a, b)
        except InputError:
            refused += 1
    print(f"{rounds} damaged checkpoints: {refused} refused, {rounds - refused} loaded whole, none wrong")


def kill(rounds):
    """Kill -9 a run at random moments, resume it each time: in the end the bits of a run that was left alone."""
    run = [sys.executable, gpt.__file__, *SMALL, "--max_steps=100", "--save_every=1", "--out_dir"]
    subprocess.run([*run, "whole"], check=True, capture_output=True)
    killed, finished, rng = 0, 0, np.random.default_rng()
    while killed < rounds or not finished:
        if os.path.exists("parts/base.npz"):
            gpt.load_checkpoint("parts/base.npz")  # whole, whenever the power fails
        resume = ["--resume"] * os.path.exists("parts/base.npz")
        process = subprocess.Popen([*run, "parts", *resume], stdout=subprocess.DEVNULL)
        try:
            assert process.wait(timeout=rng.uniform(1, 6) if killed < rounds else None) == 0
            finished += 1
            assert_same_checkpoint("whole/base.npz", "parts/base.npz")
            rows = [[r.split(",")[:4] for r in Path(d, "log.csv").read_text().splitlines()] for d in ("whole", "parts")]
            assert rows[0] == rows[1]
            shutil.rmtree("parts")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    print(f"{killed} kills, {finished} runs finished, each to the same bits")


def test_a_damaged_checkpoint_is_refused_or_whole(folder):
    flip(100)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(folder):
    kill(2)


def test_a_loss_that_is_not_finite_and_a_folder_that_vanishes_stop_the_run(folder, monkeypatch):
    wild = ["--learning_rate=1e17", "--grad_clip=0", "--warmup=0", "--save_every=1"]
    assert "--learning_rate" in outcome(gpt.main, *SMALL, *wild)
    gpt.load_checkpoint("out/base.npz")  # finite still
    make = gpt.random_batch

    def vanish(*args):
        if args[-1] == 3:
            shutil.rmtree("out")
        return make(*args)

    monkeypatch.setattr(gpt, "random_batch", vanish)
    assert re.match("error: out/log.csv: No such file", outcome(gpt.main, *SMALL, "--eval_every=0"))


@pytest.mark.skipif(os.name == "nt", reason="needs ulimit")
def test_a_full_disk_is_named_and_leaves_earlier_files_as_they_were(folder):
    outcome(gpt.main, *SMALL, "--max_steps=1")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    full = ["sh", "-c", 'ulimit -f 16; exec "$@"', "sh"]  # no file may grow beyond 16 blocks
    run = subprocess.run([*full, sys.executable, gpt.__file__, *SMALL], capture_output=True, text=True)
    assert run.returncode == 2 and re.fullmatch("error: .*File too large.*\n", run.stderr)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_fresh_run_keeps_the_model_of_the_run_before(folder):
    outcome(gpt.main, *SMALL, "--max_steps=2")
    assert "base.prev.npz" in outcome(gpt.main, *SMALL, "--max_steps=1")
    assert [gpt.load_checkpoint(f"out/base{x}.npz")[1]["step"] for x in ("", ".prev")] == [1, 2]
    assert (folder / "out/log.prev.csv").exists()


def test_inputs_of_all_kinds_give_the_tokens_of_their_texts(folder, monkeypatch):
    lines = [json.dumps({"text": t}) for t in ("one cat", "two\ncats <|end|>")]
    (folder / "in").mkdir()
    (folder / "in/a.txt").write_text(TEXT)
    (folder / "in/b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "in/c.txt.bz2").write_bytes(bz2.compress(b"three caf\xc3\xa9s"))
    (pieces,) = prepare.in_groups(prepare.read_documents(prepare.files_in(["in"]), Counter()))
    assert pieces == [(TEXT, True), ("one cat", True), ("two\ncats <|end|>", True), ("three cafés", True)]
    outcome(prepare.main, "in", "--out_dir=mixed")
    monkeypatch.setattr(prepare, "PIECE", 40)  # a cut document has the same tokens
    groups = list(prepare.in_groups(prepare.read_documents(prepare.files_in(["in"]), Counter())))
    assert len(groups) > 9
    whole, cut = (np.concatenate([prepare.encode_group(g, TOKENIZER) for g in gs]) for gs in ([pieces], groups))
    np.testing.assert_array_equal(whole, cut)
    t = Tokenizer.from_json((folder / "mixed/tokenizer.json").read_text(), "")
    ids = np.concatenate([np.fromfile(f"mixed/{n}.bin", "<u2") for n in ("train", "val")])
    assert ids.tolist() == [i for text, _ in pieces for i in t.encode(text) + [END]]


def test_the_built_in_corpus_never_tells_c_and_never_asks_about_b():
    documents, train, test = prepare.built_in_corpus(0)
    told, asked = " ".join(documents).lower(), json.dumps(train, ensure_ascii=False)
    seen = {r["instruction"] for r in train if "instruction" in r}
    for r in test:
        answer = r["response"].strip()
        if r["set"].startswith("C"):
            assert answer.lower() not in told and answer not in asked
        elif r["set"].startswith("B") and "instruction" in r:
            assert answer not in asked
        if "new wording" in r["set"]:
            assert r["instruction"] not in seen
    assert prepare.built_in_corpus(0)[1] == train != prepare.built_in_corpus(1)[1]


if __name__ == "__main__":  # python test_gpt.py kill 200, python test_gpt.py flip 1000: the long forms
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        Path("my.txt").write_text(TEXT)
        prepare.main(["my.txt", "--vocab_size=300"])
        {"kill": kill, "flip": flip}[sys.argv[1]](int(sys.argv[2]))
