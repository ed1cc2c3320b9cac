"""Why the code is right: its second explanation. First the model once more in plain NumPy, its
backward pass derived by hand; then what must hold for the step, generation, tokenizer, masks,
files as people have them, and for the programs as they are run.

    python -m pytest -q              # on a Mac this runs every check on the Apple GPU
    python -m pytest -q -k twin      # the tests whose name holds this word
"""
import bz2
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import math
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import unicodedata
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
from data.world import built_in_corpus
from prepare import ASSISTANT, END, SPECIAL, USER, InputError, Tokenizer

pytestmark = pytest.mark.filterwarnings("error")  # deprecations too
jax.config.update("jax_numpy_rank_promotion", "raise")
gpt.norm = jax.numpy_rank_promotion("allow")(gpt.norm)  # its gain alone meets more dimensions
tree, replace = jax.tree, dataclasses.replace
only_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals and terminals")

# ---------------------------------------------------------------- the NumPy twin

B, T, L, H, D, V = 6, 7, 2, 3, 22, 13  # sizes that cannot be mistaken for one another


def twin_norm(x, gain):
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * r * gain, r


def twin_norm_back(dy, x, r, gain):
    """y = x r gain with r = mean(x^2)^(-1/2): dr = -r^3 x dx / C."""
    dh = dy * gain
    return r * dh - x * r**3 * (x * dh).mean(-1, keepdims=True), (dy * x * r).sum(0)


def twin_rotate(x, angle):
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def twin_softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def split_heads(x):
    return x.reshape(len(x), H, D).swapaxes(0, 1)


def join_heads(x):
    return x.swapaxes(0, 1).reshape(-1, H * D)


def twin(params, x, y, w):
    """One sequence in float64: x, y, w (T,) -> logits, the weighted sum of the losses, and its
    gradient by hand."""
    T, g, kept = len(x), tree.map(np.zeros_like, params), []
    angle = np.arange(T)[:, None] / 10000 ** (np.arange(D // 2) / (D // 2))
    h = params["wte"][x]
    for p in params["blocks"]:
        n1, r1 = twin_norm(h, p["norm1"])
        q, k, v = map(split_heads, np.split(n1 @ p["attn"]["wqkv"], 3, axis=-1))
        q, k = twin_rotate(q, angle), twin_rotate(k, angle)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(D)
        a = twin_softmax(np.where(np.tri(T) > 0, scores, -np.inf))
        o = join_heads(a @ v)
        mid = h + o @ p["attn"]["wo"]
        n2, r2 = twin_norm(mid, p["norm2"])
        u = np.maximum(n2 @ p["mlp"]["w_up"], 0)
        kept.append((h, n1, r1, q, k, v, a, o, mid, n2, r2, u))
        h = mid + u**2 @ p["mlp"]["w_down"]
    n, r = twin_norm(h, params["norm"])
    logits = n @ params["wte"].T
    p = twin_softmax(logits)
    loss = -(w * np.log(p[np.arange(T), y])).sum()

    dlogits = w[:, None] * (p - np.eye(len(params["wte"]))[y])  # softmax, cross-entropy together
    g["wte"] += dlogits.T @ n  # the embedding is used twice: here as the head ...
    dh, g["norm"] = twin_norm_back(dlogits @ params["wte"], h, r, params["norm"])
    for p, gb, saved in list(zip(params["blocks"], g["blocks"], kept))[::-1]:
        h, n1, r1, q, k, v, a, o, mid, n2, r2, u = saved
        gb["mlp"]["w_down"] = (u**2).T @ dh
        du = dh @ p["mlp"]["w_down"].T * 2 * u
        gb["mlp"]["w_up"] = n2.T @ du
        dmid, gb["norm2"] = twin_norm_back(du @ p["mlp"]["w_up"].T, mid, r2, p["norm2"])
        dmid += dh
        gb["attn"]["wo"] = o.T @ dmid
        do = split_heads(dmid @ p["attn"]["wo"].T)
        da = do @ v.swapaxes(1, 2)
        ds = a * (da - (a * da).sum(-1, keepdims=True)) / np.sqrt(D)
        dq = twin_rotate(ds @ k, -angle)
        dk = twin_rotate(ds.swapaxes(1, 2) @ q, -angle)
        dv = a.swapaxes(1, 2) @ do
        dqkv = np.concatenate([join_heads(z) for z in (dq, dk, dv)], axis=-1)
        gb["attn"]["wqkv"] = n1.T @ dqkv
        dh, gb["norm1"] = twin_norm_back(dqkv @ p["attn"]["wqkv"].T, h, r1, p["norm1"])
        dh += dmid
    np.add.at(g["wte"], x, dh)  # ... and here as the table
    return logits, loss, g


@pytest.fixture(scope="module")
def case():
    """A model whose parameters are all random, a batch with uneven weights, what the twin says."""
    cfg = sft.Config(n_layer=L, n_head=H, n_embd=H * D, block_size=T, vocab_size=V, batch_size=B,
                     dtype="float32", weight_decay=0.1, beta=0.3)
    rng = np.random.default_rng(0)
    params = tree.map(lambda p: p + np.float32(rng.normal(0, 0.2, p.shape)),
                      gpt.init_params(cfg, rng))
    tokens = np.int32(rng.integers(0, V, (B, T + 1)))
    x, y, w = batch = tokens[:, :-1], tokens[:, 1:], np.float32(rng.integers(0, 3, (B, T)))
    exact = tree.map(np.float64, params)
    logits, losses, gradients = zip(*(twin(exact, *row) for row in zip(x, y, w)))
    total, gradient = sum(losses), tree.map(lambda *g: sum(g), *gradients)
    logits, losses = np.array(logits), np.array(losses)
    return types.SimpleNamespace(**locals())


def assert_close(a, b, tolerance):
    """Trees of arrays, each compared on the scale of its largest number."""
    for (name, x), y in zip(gpt.named_leaves(a).items(), tree.leaves(b)):
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), name


# ---------------------------------------------------------------- model, step, generation


@pytest.mark.parametrize("queries", [9, 3])
@pytest.mark.parametrize("dtype, near", [("float32", 1e-4), ("bfloat16", 0.05)])
def test_logits_loss_and_every_gradient_equal_the_twins(case, dtype, near, queries, monkeypatch):
    if dtype == "bfloat16" and gpt.on_metal():
        pytest.skip("Metal has no bfloat16")
    monkeypatch.setattr(gpt, "QUERIES", queries)  # in one block of queries, and in three
    cfg = replace(case.cfg, dtype=dtype)

    @jax.jit
    def all_of_it(params):
        logits = gpt.logits_of(params, gpt.forward(params, case.x, cfg)[0], cfg)
        objective = jax.value_and_grad(gpt.loss, has_aux=True)
        return logits, objective(params, case.batch, None, cfg)

    logits, ((total, count), gradient) = all_of_it(case.params)
    assert_close(logits, case.logits, near)
    assert (np.abs(logits - case.logits).max() > 1e-3) == (dtype == "bfloat16")  # it is rounded
    assert total == pytest.approx(case.total, rel=near / 5) and count == case.w.sum()
    assert_close(gradient, case.gradient, near)


def test_dropout_depends_on_key_and_place_keeps_the_mean_and_is_off_without_a_key(case):
    def dropped(key, place=5, ones=np.ones((99, 99), np.float32)):
        return np.asarray(gpt.drop(ones, replace(case.cfg, dropout=0.25), key, place))

    key, other = np.array([[0, 1], [0, 2]], np.uint32)
    a = dropped(key)
    assert (a == dropped(key)).all() and (a != dropped(key, 6)).any() and (a != dropped(other)).any()
    assert np.unique(a) == pytest.approx([0, 4 / 3]) and abs(a.mean() - 1) < 0.02
    assert (dropped(None) == 1).all()


def test_adam_equals_its_closed_form_with_decay_and_clipping(case):
    expected, history = {"matrix": np.ones((3, 5)), "gain": np.ones(5)}, []
    state = gpt.new_state(dict(expected))
    for t in range(1, 6):
        grads = tree.map(lambda p: case.rng.normal(size=p.shape) * 10.0 ** (t - 3), expected)
        state = gpt.adam(state, grads, t, 0.01, case.cfg)
        length = np.sqrt(sum((g**2).sum() for g in grads.values()))
        history.append(tree.map(lambda g: g * min(1, 1 / length), grads))
        for name, p in expected.items():
            past = [(t - i, g[name]) for i, g in enumerate(history, 1)]
            mean = sum(0.1 * 0.9**age * g for age, g in past) / (1 - 0.9**t)
            square = sum(0.01 * 0.99**age * g**2 for age, g in past) / (1 - 0.99**t)
            decay = 0.1 * p if name == "matrix" else 0
            expected[name] = p - 0.01 * (mean / (np.sqrt(square) + 1e-8) + decay)
    assert_close(state["params"], expected, 1e-5)


def test_the_learning_rate_warms_up_and_falls_to_a_twentieth():
    cfg = gpt.Config(learning_rate=1.0, warmup=10 / 110, max_steps=110)
    rates = [gpt.learning_rate(step, cfg) for step in (0, 10, 60, 110)]
    assert rates == pytest.approx([1 / 11, 1, 0.525, 0.05])


@pytest.mark.parametrize("micro, shard", [(1, False), (3, False), (3, True)])  # 6 devices, 2
def test_a_step_takes_the_twins_gradient_however_batch_and_parameters_are_split(case, micro, shard):
    cfg = replace(case.cfg, batch_size=B // micro, grad_accum=micro, shard_params=shard)
    before, loss = gpt.new_state(case.params), functools.partial(gpt.loss, cfg=cfg)
    home, devices = gpt.homes(before, cfg), gpt.placements(cfg.batch_size)[0].mesh.size
    for weight in (0, 1):  # a batch without weights has gradient zero, not NaN
        parts = zip(*(np.split(a, micro) for a in (case.x, case.y, weight * case.w)))
        step = gpt.make_step(loss, dict(enumerate(parts, 4 * micro)).get, cfg, home)
        state, mean = step(tree.map(gpt.put, before, home), 4, 0.01)
        share = weight / case.w.sum()
        assert float(mean) == pytest.approx(share * case.total, rel=1e-5)
        gradient = tree.map(lambda g: np.float32(g * share), case.gradient)
        assert_close(state, gpt.adam(before, gradient, 5.0, 0.01, cfg), 1e-3)
    for a in tree.leaves(state):  # split: to each device its part of the memory
        assert a.addressable_shards[0].data.nbytes * (devices if shard else 1) == a.nbytes


def test_generation_with_the_cache_is_the_argmax_of_the_full_pass_past_block_size_too(case, monkeypatch):
    monkeypatch.setattr(gpt, "END", 4)  # that some rows end in
    prompts = [row[:n].tolist() for row, n in zip(case.x, [1, 3, T, 2, 5])]
    prompts += [[4] * (T + 2), [1], [2]]
    steps = gpt.make_generator(case.cfg)(case.params, prompts, 3 * T, case.rng)
    said = [*zip(*(new for new, _ in steps))]
    assert {4 in row for row in said} == {True, False}
    for window, new in zip(prompts, said):
        window, ended = window[-T:], False
        for id in new:
            window = window if len(window) <= T else window[-(T // 2 + 1):]
            logits = twin(case.exact, window, window, np.zeros(len(window)))[0]
            assert id == (4 if ended else logits[-1].argmax())
            window.append(id)
            ended = id == 4


def test_sampling_obeys_temperature_top_k_top_p_and_penalty():
    def drawn(temperature=1, history=(), **how):
        logits, rng = np.log([0.5, 0.3, 0.15, 0.05]), np.random.default_rng(0)
        return Counter(gpt.sample(logits, history, rng, temperature, **how) for _ in range(2000))

    assert [*drawn(0)] == [*drawn(top_p=0)] == [0] and [*drawn(0, [0], repetition_penalty=2.0)] == [1]
    assert {*drawn(top_k=2)} == {*drawn(top_p=0.79)} == {0, 1} and {*drawn(top_p=0.81)} == {0, 1, 2}
    assert abs(drawn()[1] - 600) < 60 and abs(drawn(2)[1] - 587) < 60


# ---------------------------------------------------------------- tokenizer and examples


def naive_bpe(words, vocab_size):
    """The definition: count all pairs anew before each merge; the most frequent one, of equals the
    smallest. An id is a character here, so that str.replace merges; 0 to 2 are the special ids,
    bytes follow, the first merge is 259."""
    words, merges = ["".join(chr(3 + b) for b in word.encode()) for word in words], []
    while 259 + len(merges) < vocab_size:
        count = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if count[best] < 2:
            break
        words = [word.replace("".join(best), chr(259 + len(merges))) for word in words]
        merges.append((ord(best[0]), ord(best[1])))
    return merges


def tokenizer_of(text, size=320):
    return Tokenizer(prepare.train_bpe(Counter(prepare.WORD.findall(text)), size))


TOKENIZER = tokenizer_of("the cat sat on the mat, the hat; user assistant end 1234 naïve café " * 3)


def odd_texts():
    """Fragments that nest and split the special tokens, among any code points."""
    rng, fragments = np.random.default_rng(1), "<| |> user é \U0001f600 12345 'll \ud800 \0".split(" ")
    for top in [0x250, 0x110000] * 200:
        others = [*SPECIAL, " the", "  ", "\n", *map(chr, rng.integers(top, size=14))]
        yield "".join(rng.choice(np.array(fragments + others, object), rng.integers(20)))


def test_fast_training_learns_the_merges_of_the_naive_definition_and_wikipedias_example():
    for seed in range(50):
        letters = np.random.default_rng(seed).choice(list("aaabbc  é"), 200)
        words = "".join(letters).split(" ")
        assert prepare.train_bpe(Counter(words), 290) == naive_bpe(words, 290)
    t = Tokenizer(prepare.train_bpe(Counter(["aaabdaaabac"]), 262))
    assert [t.bytes[i] for i in t.encode("aaabdaaabac")] == [b"aaab", b"d", b"aaab", b"a", b"c"]


def test_any_text_survives_encoding_and_no_text_becomes_a_special_token():
    again = Tokenizer.from_json(TOKENIZER.to_json(), "tokenizer.json")
    for text in odd_texts():
        ids = TOKENIZER.encode(text)
        assert again.decode(ids) == text.encode("utf-8", "replace").decode()
        assert again.encode(text) == ids and not {END, USER, ASSISTANT} & {*ids}
        ids = [*ids, END, *range(200, 250)][::-1]  # also pieces of characters can be streamed
        assert "".join(TOKENIZER.stream(ids)) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("text", ["a", " ", "\n ", "한", "東", "e\u0301", "\u0e01\u0e34", "_", "7"])
def test_hostile_text_takes_linear_time(text):
    text *= 1 << 17
    for tokenizer in (tokenizer_of(text, 270), TOKENIZER):  # quadratic time would be hours
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_combining_marks_stay_in_their_word():
    words = prepare.WORD.findall
    assert words("हिन्दी में लिखा") == ["हिन्दी", " में", " लिखा"]
    decomposed = unicodedata.normalize("NFD", "Café crème")
    assert words(decomposed) == decomposed.replace(" ", "| ").split("|")
    thai = words("ภาษาไทยที่นี่")
    assert len(thai) > 1 and all(unicodedata.category(word[0]) == "Lo" for word in thai)


def dialogue(*texts):
    """dialogue("hi", "ho") -> [("user", "hi", False), ("assistant", "ho", True)]"""
    return [(("user", "assistant")[i % 2], text, i % 2 == 1) for i, text in enumerate(texts)]


def test_answers_and_their_ends_are_trained_and_nothing_else():
    q1, a1, q2, a2 = (TOKENIZER.encode(f" {t}") for t in ["the cat?", "a mat", "and?", "the hat"])
    ids, trained = sft.render(dialogue("the cat?", "a mat", "and?", "the hat"), TOKENIZER)
    assert ids == [USER, *q1, ASSISTANT, *a1, END, USER, *q2, ASSISTANT, *a2, END]
    x, y, w = sft.shift(ids, trained, 64)
    padding = [0] * (65 - len(ids))
    assert x.tolist() == ids[:-1] + padding and y.tolist() == ids[1:] + padding
    assert y[w == 1].tolist() == [*a1, END, *a2, END]  # not what follows an end, not the padding


def test_the_prompt_of_chat_begins_the_training_example_without_the_oldest_turns():
    for question in odd_texts():
        prompt = chat.prompt_ids(dialogue(question), TOKENIZER, 256)
        ids, trained = sft.render(dialogue(question, "a mat"), TOKENIZER)
        assert prompt == ids[:len(prompt)] and trained.index(True) == len(prompt)
    turns = dialogue(*["the cat " * 5, "a mat"] * 20, "the hat?")
    shorter = [sft.render(turns[n:], TOKENIZER)[0] for n in range(0, 41, 2)]
    fits = next(ids for ids in shorter if len(ids) + 24 <= 64)
    assert chat.prompt_ids(turns, TOKENIZER, 64) == fits


def test_the_dpo_loss_and_its_gradient_equal_the_papers(case):
    """The rows of the batch in pairs, the first of each preferred; the twin gives their losses."""
    batch, logp = [a.reshape(3, 2, T) for a in case.batch], -case.losses.reshape(3, 2)
    reference, beta = np.float32(logp + case.rng.normal(size=(3, 2))), case.cfg.beta

    @functools.partial(jax.jit, static_argnums=1)
    def value(arrays, anchor=0.0):
        objective = jax.value_and_grad(sft.dpo_loss, has_aux=True)
        return objective(case.params, arrays, None, case.cfg, anchor)

    (total, count), gradient = value([*batch, reference], 0.7)
    margin = beta * ((logp - reference) @ [1, -1])
    per_token = 0.7 / batch[2][:, 0].sum(-1)
    expected = np.log1p(np.exp(-margin)) - per_token * logp[:, 0]
    assert count == 3 and total == pytest.approx(expected.sum(), rel=1e-4)
    doubt = beta / (1 + np.exp(margin))
    factors = np.stack([doubt + per_token, -doubt], axis=1).ravel()  # of the rows' gradients
    assert_close(gradient, tree.map(lambda *g: sum(map(np.multiply, factors, g)), *case.gradients), 1e-3)
    (before, _), _ = value([*batch, np.float32(logp)])
    assert before == pytest.approx(3 * math.log(2), abs=1e-4)  # nothing is learned yet
    (swapped, _), _ = value([a[:, ::-1] for a in (*batch, reference)])
    assert swapped == pytest.approx(np.log1p(np.exp(margin)).sum(), rel=1e-4)


# ---------------------------------------------------------------- files as people have them

SHOWN = """
{"instruction": "Hi", "input": "", "context": null, "output": "Ho", "id": 7}
= <|user|> Hi<|assistant|>[ Ho<|end|>]
{"instruction": "Sum", "context": "2+2", "response": "4"}
= <|user|> Sum//2+2<|assistant|>[ 4<|end|>]
{"instruction": "", "input": "What is 2+2?", "output": "4"}
= <|user|> What is 2+2?<|assistant|>[ 4<|end|>]
{"prompt": "Schlüssel?", "completion": "weiß 😀 — 東京 \\ud83d"}
= <|user|> Schlüssel?<|assistant|>[ weiß 😀 — 東京 ?<|end|>]
{"prompt": [{USER: "Hi"}], "completion": [{BOT: "Ho"}]}
= <|user|> Hi<|assistant|>[ Ho<|end|>]
{"messages": [{"role": "system", "content": ""}, {USER: "Hi"}, {BOT: "Ho", "tool_calls": null}]}
= <|user|> Hi<|assistant|>[ Ho<|end|>]
{"messages": [{"role": "developer", "content": "Be"}, {USER: [{"text": "H"}, {"text": "i"}]}, {BOT: "Ho"}]}
= <|user|> Be//Hi<|assistant|>[ Ho<|end|>]
{"messages": [{USER: "Q"}, {BOT: "bad", "weight": 0}, {USER: "R"}, {BOT: "good", "weight": 1}]}
= <|user|> Q<|assistant|> bad<|end|><|user|> R<|assistant|>[ good<|end|>]
{"conversations": [{"from": "system", "value": "Be"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
= <|user|> Be//Hi<|assistant|>[ Ho<|end|>]
{"conversations": [{USER: "Hi"}, {BOT: "Ho"}, {USER: "Bye"}]}
= <|user|> Hi<|assistant|>[ Ho<|end|>]
{"instruction": "Hi", "input": "now", "chosen": "Ho", "rejected": "No"}
= <|user|> Hi//now<|assistant|>[ Ho<|end|>] <|user|> Hi//now<|assistant|>[ No<|end|>]
{"prompt": "Hi", "chosen": [{USER: "Hi"}, {BOT: "Ho"}], "rejected": [{USER: "Hi"}, {BOT: "No"}]}
= <|user|> Hi<|assistant|>[ Ho<|end|>] <|user|> Hi<|assistant|>[ No<|end|>]
{"prompt": [{USER: "A"}, {BOT: "B"}, {USER: "C"}], "chosen": [{BOT: "B"}], "rejected": "D"}
= @ C<|assistant|>[ B<|end|>] @ C<|assistant|>[ D<|end|>]
"""
LEFT_OUT = """
{"instruction": "area", "input": "4 cm x 5 cm", "output": ""}
{"instruction": ["list"], "output": 4}
{"instruction": "cut", "outp
[1, {"foo": null}]
{"messages": "hi"}
{"messages": [{USER: "no answer"}]}
{"messages": [{BOT: "opens"}, {USER: "Q"}, {BOT: "A"}]}
{"messages": [{USER: "Q"}, {BOT: "A"}, {BOT: "twice"}]}
{"messages": [{USER: "Q"}, {BOT: "all of weight", "weight": 0}]}
{"messages": [{USER: "Q"}, {BOT: null, "tool_calls": [{"id": 1}]}, {"role": "tool", "content": "4"}]}
{"messages": [{USER: [{"type": "image_url"}]}, {BOT: "A"}]}
{"prompt": "same", "chosen": "Yes", "rejected": "Yes"}
{"prompt": "none rejected", "chosen": "Yes"}
"""


def records_of(table):
    long = table.replace("USER", '"role": "user", "content"')
    return long.replace("BOT", '"role": "assistant", "content"').strip().split("\n")


def shown(path, record):
    how = f"--dpo={path}" if "chosen" in record else path
    return outcome(sft.main, how, "--show=9", "--init=out/base.npz").replace("\n<|user", " <|user")


@pytest.mark.parametrize("record, expected", [*zip(*[iter(records_of(SHOWN))] * 2)])
def test_a_record_of_any_public_shape_is_read(made, record, expected):
    expected = expected[2:].replace("//", "\n\n")
    expected = expected.replace("@", "<|user|> A<|assistant|> B<|end|><|user|>")
    path = Path("records.json")  # JSON lines, though not named so; then a list
    path.write_bytes(f"\ufeff{record}\r\n".encode())
    assert expected in shown("records.json", record)
    path.write_bytes(f"[\n{record},\n{record}\n]".encode())
    assert shown("records.json", record).endswith(f"{expected} {expected}\n")


@pytest.mark.parametrize("record", records_of(LEFT_OUT))
def test_an_odd_record_costs_itself_and_is_named(made, record):
    good = '{"prompt": "Hi", "response": "Ho", "chosen": "Ho", "rejected": "No"}'
    Path("records.jsonl").write_text("\n".join([good, record, good]))
    said = shown("records.jsonl", record)
    assert said.startswith("left out: 1 ") and "records.jsonl:2)" in said
    assert said.count("<|assistant|>[ Ho") == 2


def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(Path(name).suffix, bytes)
    Path(name).write_bytes(pack(content))


TEXT_FILES = r"""
c4-train.00000-of-01024.json.gz | {"text": "one"}\n{"text": "two", "url": ""}\n | one;two |
wiki_00 | \n{"text": "one"}\n{"text": "two"} | one;two |
w.txt.bz2 | {"text": "one and two"}\n{"text": " "}\n{"id": 1}\n{"te | one and two | left out: 1 empty document
stories.txt | one\n<|endoftext|>\ntwo<|endoftext|>three | one\n;two;three |
dos.txt | \ufeffone\r\ntwo\rthree\n | one\ntwo\nthree\n |
spaces | a\xa0b\u3000c\u06cc\u200c\u062e\u200d\xado | a\xa0b\u3000c\u06cc\u200c\u062e\u200d\xado |
broken.txt | caf\xe9 na\xefve\n\udce9t\xe9 | caf\xe9 na\xefve\n\ufffdt\xe9 | not UTF-8 (the first: broken.txt:2)
markdown | [link](x)\n{braces}\n | [link](x)\n{braces}\n |
"""


@pytest.mark.parametrize("row", TEXT_FILES.strip().split("\n"))
def test_a_file_of_text_becomes_the_documents_that_are_in_it(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, text, documents, says = row.encode().decode("unicode_escape").split(" | " if row[-1] != "|" else " |")
    write(name, text.lstrip(" ").encode("utf-8", "surrogateescape"))
    assert says in outcome(prepare.main, name, "--vocab_size=300")
    assert documents_in("data") == documents.lstrip(" ").split(";")


def test_of_a_folder_the_text_is_taken_and_one_odd_file_costs_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in """B.TXT a.md sub/c.txt.gz .hidden.txt .git/x.txt env/pyvenv.cfg env/lib/x.txt code.py
            tokenizer.json qa.jsonl nul.txt latin.txt""".split():
        write(f"in/{name}", name.encode())
    write("in/sub/wiki_00", b'{"text": "one"}\n{"text": "two"}')
    write("in/nul.txt", b"a\0b")
    write("in/latin.txt", "déjà vu, ça été\n".encode("latin-1") * 20)
    with contextlib.suppress(OSError):  # Windows asks for a right
        os.symlink(tmp_path / "in", "in/sub/again")
    said = outcome(prepare.main, "in")
    assert re.search(r"left out: 2 files \(the first: in.latin.txt: not UTF-8; .* iconv", said)
    assert documents_in("data") == ["B.TXT", "a.md", "sub/c.txt.gz", "one", "two"]


def test_printable_takes_from_text_only_what_can_steer_a_terminal():
    harmless = "a\n\t\u00a0\u3000\u200c\u200d\u00ad é東 👨\u200d👩\U0001fae8"
    assert prepare.printable(harmless) == harmless
    for c in "\0\x07\r\x1b\x7f\x9b\ud800\u202e\u2066":
        assert prepare.printable(f"a{c}b") == "a\ufffdb"


def test_the_quota_of_a_container_limits_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    for quota, cores in [("150000 100000", 2), ("max 100000", 8), ("1000 100000", 1)]:
        monkeypatch.setattr(Path, "read_text", lambda path: quota)
        assert prepare.available_cores() == cores


# ---------------------------------------------------------------- the programs

DOCUMENTS = ["the cat sat on the mat and the rat ran from the cat to the hat\n" * 40, "one cat", "café"]
SMALL = "--n_layer=1 --n_head=2 --log_every=1 --batch_size=4 ".split()
TINY = [*SMALL, "--n_embd=16", "--block_size=16"]
RUNS = {  # name: script, flags, log, how it goes on
    "base": (gpt, [*SMALL, *"--n_embd=32 --block_size=96 --dropout=0.02 --grad_accum=2 --max_steps=100"
                   " --eval_every=7".split()], "log.csv", [gpt, "--resume"]),
    "chat": (sft, "pairs.json --batch_size=8 --max_steps=100 --eval_every=7 --log_every=1"
             " --learning_rate=0.01".split(), "log_chat.csv", [chat, "--prompt=hi"]),
    "dpo": (sft, "--dpo=prefs.json --max_steps=40 --batch_size=4 --eval_every=7 --log_every=1".split(),
            "log_dpo.csv", [sft, "--dpo", "--resume"])}
FULL = "X" * (96 - 6)  # X is a token; so are the three special ones, two spaces and Y: 96 in all
PAIRS = f"""{{"prompt": "where is the cat?", "chosen": "the cat sat on the mat", "rejected": "Z"}}
{{"prompt": "who ran?", "chosen": "the rat ran", "rejected": "Z"}}
{{"prompt": "{FULL}", "chosen": "Y", "rejected": "Z"}}
{{"prompt": "{FULL}X", "chosen": "Y", "rejected": "Z"}}
"""


def outcome(main, *argv):
    """What a script prints; for an error its one line, after checking the exit status."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            prepare.run(main, list(argv))
        except SystemExit as e:
            assert e.code == 2 and re.fullmatch("error: .*\n", errors.getvalue())
    return errors.getvalue() or out.getvalue()


def start(script, *argv, shell=(), **how):
    """The same as a process of its own."""
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE) | how
    return subprocess.Popen([*shell, sys.executable, script.__file__, *argv], text=True,
                            encoding="utf-8", **pipes)


def end(process, typed=None):
    """-> what it printed, its errors, its exit status"""
    return *process.communicate(typed), process.returncode


def documents_in(folder):
    tokenizer = Tokenizer.load(f"{folder}/tokenizer.json")
    tokenizer.bytes[END] = b"\0"
    ids = [i for name in ("train", "val") for i in np.fromfile(f"{folder}/{name}.bin", "<u2")]
    return tokenizer.decode(ids).split("\0")[:-1]


def cells(path):
    return [line.split(",") for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """In a new folder: a text, and a base, a chat and a DPO model from it. What was printed."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("made"))
    Path("pairs.json").write_text(PAIRS.replace("chosen", "response"))
    Path("prefs.json").write_text(PAIRS * 9)
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    said = outcome(prepare.main, "text.jsonl", "--vocab_size=300")
    for script, flags, *_ in RUNS.values():
        said += outcome(script.main, *flags)
    yield said
    os.chdir(before)


def test_the_road_from_text_to_answers(made):
    for words in ("expected first loss ln", "next: python sft.py", "left out: 1 record(s) longer",
                  "left out: 9 record(s) longer", "27 examples, 1 of them held out"):
        assert words in made, made
    assert documents_in("data") == DOCUMENTS
    first = float(cells("out/log.csv")[1][1])
    assert abs(first - math.log(gpt.load_checkpoint("out/base.npz")[2].vocab_size)) < 0.2
    held_out = [float(row[2]) for row in cells("out/log_dpo.csv")[1:] if row[2]]
    assert held_out[-1] < held_out[0]
    assert outcome(sft.main, "pairs.json", "--show=1") == (
        "left out: 1 record(s) longer than the context of 96 tokens (the first: pairs.json:4)\n"
        "<|user|> where is the cat?<|assistant|>[ the cat sat on the mat<|end|>]\n")


@pytest.mark.parametrize("encoding, complains", [
    ("utf-8", ""), ("latin-1", "standard input:3: not all of it is UTF-8\n")])
def test_piped_questions_get_one_line_each(made, encoding, complains):
    process = start(chat, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    typed = f"where is the cat?\n{'X' * 96}\nOù?\nwho ran?\n"
    process.stdin.buffer.write(typed.encode(encoding))
    answers, errors, status = end(process)
    assert re.fullmatch("the cat sat on the mat\n\n.*\nthe rat ran\n", answers) and status == 0
    assert re.fullmatch(f"error: standard input:2: the question has .*\n{complains}", errors)


def test_closed_and_narrow_streams_are_no_tracebacks(made):
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    said, *rest = end(start(chat, "out/base.npz", "--prompt=café 東", env=ascii_only))
    assert said.startswith("caf? ?") and rest == ["", 0]
    if os.name != "nt":
        closed = start(chat, "--prompt=hi", shell=["sh", "-c", 'exec "$@" <&- >&-', "sh"])
        assert end(closed) == ("", "", 0)


@only_posix
def test_at_a_terminal_one_can_correct_paste_interrupt_and_leave(made):
    a_terminal = [sys.executable, "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]))"]
    process = start(chat, shell=a_terminal, env=os.environ | {"TERM": "dumb"})

    def answer(typed):
        process.stdin.write(typed)
        process.stdin.flush()
        said = ""
        while not said.endswith("\n> "):
            assert select.select([process.stdout], [], [], 20)[0], said
            said += os.read(process.stdout.fileno(), 9999).decode()
        return said

    assert "/help for help" in answer("") and "the rat ran" in answer("who ran?\n")
    assert "% ' rat'" in answer("/probs\n") and "/top_k" in answer("/help\n")
    assert "must be from" in answer("/temperature -1\n") and "1 corr" in answer("/better no rat\n")
    answer("where is\nthe cat?\n")
    assert "2 corr" in answer("/better on a mat\n") and "sat" not in answer("where is\x03")
    answer("/reset\n")
    assert "the rat ran" in answer("who ran?\n")
    assert end(process, "\x04")[1:] == ("", 0)
    first, later = Path("out/feedback.jsonl").read_text().splitlines()
    assert first == (
        '{"prompt": [{"role": "user", "content": "who ran?"}], '
        '"chosen": [{"role": "assistant", "content": "no rat"}], '
        '"rejected": [{"role": "assistant", "content": "the rat ran"}]}')
    assert later.startswith(first[:50]) and '"where is\\nthe cat?"}], "chosen"' in later


def arrays_in(path):
    return {**np.load(io.BytesIO(Path(path).read_bytes()))}


def assert_same_run(a, b, name, log):
    """That two folders have the same bits in a finished checkpoint and the same losses in a log."""
    one, two = (arrays_in(f"{folder}/{name}.npz") for folder in (a, b))
    about, also = (json.loads(str(arrays.pop("about"))) for arrays in (one, two))
    np.testing.assert_equal(one, two)
    assert about["step"] == also["step"] == about["config"]["max_steps"]
    assert [row[:4] for row in cells(f"{a}/{log}")] == [row[:4] for row in cells(f"{b}/{log}")]


def wait_for_more(log, process):
    """Wait until a run has logged more, or ended."""
    size = log.stat().st_size if log.exists() else 0
    while process.poll() is None and not (log.exists() and log.stat().st_size > size + 400):
        time.sleep(0.01)


@only_posix
@pytest.mark.parametrize("name, signals", [
    ("base", ["SIGKILL", "SIGTERM", "SIGHUP"]), ("chat", ["SIGINT"]), ("dpo", ["SIGKILL"])])
def test_a_stopped_run_goes_on_to_the_same_bits_and_no_other_writes_there(made, name, signals):
    script, flags, log, go_on = RUNS[name]
    shutil.rmtree("again", ignore_errors=True)
    shutil.copytree(".", "again", ignore=shutil.ignore_patterns("log*"))
    process = start(script, *flags, cwd="again")
    for which in signals:
        wait_for_more(Path("again/out", log), process)
        assert "program that trains there" in outcome(gpt.main, *TINY, "--out_dir=again/out")
        process.send_signal(getattr(signal, which))
        said, errors, status = end(process)
        step = gpt.load_checkpoint(f"again/out/{name}.npz")[1]["step"]  # whole at every moment
        says = f"interrupted at step {step}, saved .*go on with.* --resume"
        assert which == "SIGKILL" or status == 130 and re.search(says, said), (said, errors)
        process = start(*go_on, cwd="again")
    assert end(process)[1:] == ("", 0) or name == "chat"
    assert_same_run("out", "again/out", name, log)
    kept = Path(f"again/out/{name}.prev.npz").read_bytes()  # a fresh run keeps the one before it
    assert kept == Path(f"out/{name}.npz").read_bytes()


def test_minutes_set_the_steps_once_and_without_eval_every_nothing_is_validated(made):
    said = outcome(gpt.main, *TINY, "--out_dir=timed", "--minutes=0.04", "--eval_every=0")
    [steps] = re.findall(r"(\d+) steps in 0.04 minutes", said)
    about = gpt.load_checkpoint("timed/base.npz")[1]
    assert int(steps) == about["config"]["max_steps"] == about["step"] > 10
    assert {row[2] for row in cells("timed/log.csv")[1:]} == {""}


METAL_CAN = """dot_general add subtract multiply divide negate maximum minimum exponential log tanh
    rsqrt sqrt reduce broadcast_in_dim reshape transpose slice concatenate pad constant iota compare
    and or not select convert return""".split()
UNSAFE = re.compile(rf"\b(stablehlo|chlo)\.(?!({'|'.join(METAL_CAN)})\b)"  # an operation
                    r"|tensor<(\d+x){5}|tensor<(\d+x)*(?!f32|i32|i1\b)[a-z]")  # a shape or type


def not_for_metal(text):
    """The lines of a lowered program that Metal has not been seen to run: operations and types
    outside the list, and a transpose of a broadcast (jax#25302)."""
    found, origin = [], {}
    text = re.sub(r"array<i64|sdy\.mesh.*", "", text)  # an attribute, and where the devices are
    for line in text.splitlines():
        name, op, of = re.match(r"\s*(%\w+)? ?=? ?(\S*) ?(%\w+)?", line).groups()
        origin[name] = op
        turned = op == "stablehlo.transpose" and origin.get(of) == "stablehlo.broadcast_in_dim"
        if turned or UNSAFE.search(line):
            found.append(line)
    return found


def lowered(platform, run, monkeypatch):
    """Run something -> all that it compiles, as XLA is given it for a platform: with the arguments
    of the run, where they are placed."""
    texts, real_jit = [], jax.jit

    def jit(f, **options):
        def call(*args):
            shapes = str(tree.map(np.shape, args))
            if shapes not in seen:
                seen.add(shapes)
                program = compiled.trace(*args).lower(lowering_platforms=(platform,))
                texts.append(program.as_text())
            return compiled(*args)

        compiled, seen = real_jit(f, **options), set()
        return call

    with monkeypatch.context() as patched:
        patched.setattr(jax, "jit", jit)
        run()
    return texts


def use_all():
    """Train a step of each kind, validate, answer."""
    for script, *argv in [(gpt, *TINY, "--grad_accum=2"), (sft, "pairs.json", "--init=out/base.npz"),
                          (sft, "--dpo=prefs.json", "--init=out/chat.npz")]:
        said = outcome(script.main, *argv, "--max_steps=1", "--eval_every=1", "--out_dir=lowered")
        assert "checkpoint: lowered" in said, said
    outcome(chat.main, "out/chat.npz", "--prompt=who ran?")


def test_all_that_the_programs_compile_is_what_metal_can_do(made, monkeypatch):
    monkeypatch.setattr(gpt, "QUERIES", 30)
    monkeypatch.setattr(gpt, "on_metal", lambda: True)
    texts = lowered("METAL", use_all, monkeypatch)
    assert len(texts) > 10 and [line for text in texts for line in not_for_metal(text)] == []


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_elsewhere_they_lower_too_and_what_metal_cannot_do_would_be_found(made, platform, monkeypatch):
    train = functools.partial(outcome, gpt.main, *TINY, "--max_steps=1", "--dtype=bfloat16", "--out_dir=l")
    unsafe = "".join("".join(not_for_metal(text)) for text in lowered(platform, train, monkeypatch))
    assert all(word in unsafe for word in ("stablehlo.gather", "stablehlo.scatter", "bf16"))
    assert not_for_metal("%0 = chlo.square %x") and not_for_metal(
        "%1 = stablehlo.broadcast_in_dim %x\n%2 = stablehlo.transpose %1, dims")


def fail(gradient):
    raise RuntimeError("no such kernel\x1b")


@pytest.mark.parametrize("wrong, problem", [
    (np.positive, ""), (np.negative, "its gradients"),
    (lambda gradient: np.append(-gradient[:1 << 16], gradient[1 << 16:]), "its gradients"),  # of attn
    (functools.partial(np.multiply, np.nan), "its gradients"), (fail, "no such kernel")])
def test_a_gpu_of_apples_is_trusted_only_if_it_agrees_with_the_cpu(wrong, problem, monkeypatch, capsys):
    (cpu, gpu, *_), right = jax.devices("cpu"), gpt.small_gradient
    monkeypatch.setattr(gpt, "on_metal", lambda: gpt.device() == gpu)
    monkeypatch.setattr(gpt, "small_gradient", lambda where: (wrong if where == gpu else np.positive)(right(where)))
    jax.config.update("jax_default_device", gpu)
    gpt.check_device()
    assert gpt.device() == (cpu if problem else gpu)
    assert re.fullmatch(f".* all runs on the CPU: .*{problem}.*\n" if problem else "", capsys.readouterr().err)
    jax.config.update("jax_default_device", None)


def test_a_damaged_checkpoint_is_refused_or_whole_and_none_is_written_that_is_not_finite(made):
    path, whole = Path("damaged.npz"), Path("out/base.npz").read_bytes()
    state = gpt.load_checkpoint("out/base.npz")[0]
    arrays = arrays_in("out/base.npz")
    gain = arrays["params.norm"]
    for wrong in (gain * np.float32(np.nan), gain[1:], gain.astype(np.float64)):
        np.savez(path, **arrays | {"params.norm": wrong})
        with pytest.raises(InputError, match="params.norm"):
            gpt.load_checkpoint(path)
    for place in np.random.default_rng(0).integers(len(whole), size=60):
        rest = bytes([whole[place] ^ 1]) + whole[place + 1:] if place % 2 else b""
        path.write_bytes(whole[:place] + rest)
        with contextlib.suppress(InputError):
            tree.map(np.testing.assert_array_equal, gpt.load_checkpoint(path)[0], state)
    wild = "--out_dir=wild --learning_rate=1e9 --weight_decay=1e9 --warmup=0 --eval_every=1".split()
    assert "smaller --learning_rate" in outcome(gpt.main, *TINY, *wild)
    gpt.load_checkpoint("wild/base.npz")


REFUSED = """
prepare missing -> missing: No such file
prepare empty -> empty: empty
prepare binary -> binary: not text
prepare utf16 -> utf16: not text .* UTF-16
prepare latin -> latin: not UTF-8; .* iconv
prepare cut.gz -> cut.gz:1: damaged
prepare pairs.json -> pairs.json: no text in it; questions and answers are for sft.py
prepare short -> too little text
prepare text.jsonl --vocab_size=3 -> --vocab_size 3: must be at least 259
gpt --n_layr 6 -> did you mean --n_layer\\?
gpt --n_embd=30 -> multiple of 2 x n_head
gpt --learning_rate=nan -> --learning_rate nan: must be
gpt --block_size=5000 -> 5001 needed
gpt --data_dir=odd -> odd.train.bin: damaged
gpt --data_dir=foreign -> not a tokenizer
gpt --init=text.jsonl -> text.jsonl: no whole checkpoint
gpt --init=out/base.npz --n_layer=2 -> was begun with 1
gpt --init=out/base.npz --data_dir=other -> another vocabulary
gpt --resume --seed=7 -> was begun with 0
gpt --resume --out_dir=nowhere -> no whole checkpoint
sft missing.json -> missing.json: No such file
sft empty -> empty: empty
sft short -> no question with an answer
sft cut.json -> cut.json: no question .* not JSON
sft other.jsonl --resume -> was begun with
sft --dpo --resume --seed=7 -> was begun with 0
sft --dpo --init=out/dpo.npz -> would be overwritten
sft text.jsonl --dpo -> text.jsonl: no question with an answer
chat none.npz -> none.npz: no whole checkpoint
chat cut.npz -> cut.npz: no whole checkpoint
chat --top_p=2 -> --top_p 2.0: must be from 0 to 1
""".strip().split("\n")
BAD_FILES = {
    "other.jsonl": b'{"prompt": "a", "response": "b"}',
    "empty": b"", "binary": b"a\0b", "utf16": "hi".encode("utf-16"), "short": b"a",
    "latin": "déjà vu, ça été\n".encode("latin-1") * 9, "cut.npz": b"PK\3\4" + bytes(99),
    "cut.json": b'[{"prompt": "a"', "odd/train.bin": b"abc" * 99, "foreign/tokenizer.json": b"{}"}


def test_what_cannot_be_done_is_refused_in_one_line_and_changes_nothing(made):
    outcome(prepare.main, "text.jsonl", "--vocab_size=270", "--out_dir=other")
    for folder in ("odd", "foreign"):
        shutil.copytree("data", folder)
    for name, content in BAD_FILES.items():
        write(name, content)
    Path("cut.gz").write_bytes(gzip.compress(b"text" * 99)[:20])

    def files():
        return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    before = files()
    for command, message in (line.split(" -> ") for line in REFUSED):
        script, *argv = command.split()
        said = outcome(sys.modules[script].main, *argv)
        assert re.match(f"error: .*{message}", said), (command, said)
    full_disk = ["sh", "-c", 'ulimit -f 16; exec "$@"', "sh"]  # no file beyond 16 blocks
    for flag, shell, message in [("--coordinator=here", [], "here: HOST:PORT.*"),
                                 ("--seed=1", full_disk, "File too large")][:2 - (os.name == "nt")]:
        _, errors, status = end(start(gpt, *TINY, flag, shell=shell))
        assert re.fullmatch(f"error: .*{message}\n", errors) and status == 2
    assert files() == before


def test_two_processes_train_as_one_and_fall_together(made):
    """With split parameters; when one is killed the other ends, and both go on to the same bits."""
    flags = [*TINY, *"--max_steps=40 --eval_every=5 --learning_rate=4e-4 --dtype=float32".split()]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}

    def start_both(*more):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
        more = *flags, *more, address, "--num_processes=2", "--shard_params"
        return [start(gpt, *more, f"--process_id={i}", env=env) for i in (0, 1)]

    outcome(gpt.main, *flags, "--out_dir=one")
    first, second = start_both("--out_dir=halves")
    wait_for_more(Path("halves/log.csv"), first)
    second.kill()
    if jax.__version_info__ <= (0, 5, 0):  # these do not notice, and can hang
        first.kill()
    assert end(first)[2] and end(second)[2]
    for more in (["--out_dir=two"], ["--out_dir=halves", "--resume"]):
        assert [end(process)[2] for process in start_both(*more)] == [0, 0]
    assert_same_run("two", "halves", "base", "log.csv")
    for one, two in zip(cells("one/log.csv")[1:], cells("two/log.csv")[1:]):
        assert float(one[1]) == pytest.approx(float(two[1]), abs=1e-4)


def test_the_built_in_questions_never_tell_what_is_tested():
    documents, train, test = built_in_corpus(0)
    assert built_in_corpus(0)[1] == train != built_in_corpus(1)[1]
    told = {message["content"] for record in train for message in record.get("messages", ())}
    told |= {record.get("response") for record in train}
    seen = {record.get("instruction") for record in train}
    assert {record["set"][0] for record in test} == {*"ABU"}
    for record in test:
        question, answer = record.get("instruction"), record["response"].strip()
        assert not record["set"].startswith("B") or answer not in told
        assert "new wording" not in record["set"] or question not in seen
